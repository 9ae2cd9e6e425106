// The safetensors reader against hostile headers, the writer, and files that appear whole or not.
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/safetensors.h"
#include "zigzag/error.h"

namespace zigzag::io {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

// A folder of the test's own, removed at its end.
class IoSafetensors : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "zigzag_io_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  std::string read(const std::string& name) const {
    std::ifstream file(folder_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  void write(const std::string& name, const std::string& content) const {
    std::ofstream(folder_ / name, std::ios::binary) << content;
  }

  fs::path folder_;
};

std::string with_length(const std::string& json, const std::string& data = "") {
  std::string file(8, '\0');
  const std::uint64_t length = json.size();
  std::memcpy(file.data(), &length, sizeof(length));
  return file + json + data;
}

void expect_refused(const std::string& json, std::uint64_t data_bytes, const std::string& reason) {
  try {
    static_cast<void>(parse_safetensors_header(json, 8 + json.size() + data_bytes));
    FAIL() << "accepted: " << json.substr(0, 200);
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), HasSubstr(reason));
  }
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

TEST_F(IoSafetensors, WritesAndReadsEveryTypeBack) {
  const std::vector<DType> types{
      DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64, DType::kInt64,
      DType::kInt32,   DType::kInt16,   DType::kInt8,     DType::kUInt8,   DType::kBool};
  std::vector<SafetensorsSpec> specs;
  for (const DType type : types) {
    specs.push_back({std::string(dtype_name(type)), type, {3, 0, 2}});
    specs.push_back({std::string(dtype_name(type)) + " \"full\"", type, {3, 5}});
  }
  std::mt19937 random(5);
  std::vector<std::vector<std::byte>> contents;
  {
    SafetensorsWriter writer(path("a"), specs, {{"maker", "a test"}});
    for (std::size_t i = 0; i < specs.size(); ++i) {
      const std::size_t bytes =
          i % 2 == 0 ? 0 : 15 * static_cast<std::size_t>(item_size(specs[i].dtype));
      std::vector<std::byte> content(bytes);
      for (std::byte& b : content) b = static_cast<std::byte>(random());
      // In two pieces, the later one first.
      const std::size_t half = bytes / 2;
      writer.write(i, half, std::span(content).subspan(half));
      writer.write(i, 0, std::span(content).first(half));
      contents.push_back(std::move(content));
    }
    EXPECT_EQ(files(), 1U);
    EXPECT_FALSE(fs::exists(folder_ / "a"));
    writer.commit();
  }
  EXPECT_EQ(files(), 1U);
  const SafetensorsFile file(path("a"));
  EXPECT_EQ(file.header().metadata.at("maker"), "a test");
  EXPECT_EQ(file.header().data_offset % 64, 0U);
  ASSERT_EQ(file.header().tensors.size(), specs.size());
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const SafetensorsEntry* found = file.header().find(specs[i].name);
    ASSERT_NE(found, nullptr);
    EXPECT_EQ(found->dtype, specs[i].dtype);
    EXPECT_EQ(found->shape, specs[i].shape);
    std::vector<std::byte> content(contents[i].size());
    file.read(*found, 0, content);
    EXPECT_EQ(content, contents[i]);
    EXPECT_THROW(file.read(*found, 1, content), InvalidArgument);
    EXPECT_THROW(file.read(*found, UINT64_MAX, content), InvalidArgument);
  }
}

TEST_F(IoSafetensors, WriterRefusesBytesOutsideATensor) {
  const std::vector<SafetensorsSpec> specs{{"a", DType::kUInt8, {4}}, {"b", DType::kUInt8, {4}}};
  SafetensorsWriter writer(path("a"), specs);
  const std::vector<std::byte> five(5);
  EXPECT_THROW(writer.write(0, 0, five), InvalidArgument);
  EXPECT_THROW(writer.write(1, UINT64_MAX, std::span(five).first(2)), InvalidArgument);
  EXPECT_ANY_THROW(writer.write(2, 0, std::span(five).first(1)));
}

TEST_F(IoSafetensors, WithoutCommitNothingChanges) {
  write("a", "before");
  {
    SafetensorsWriter writer(path("a"), std::vector<SafetensorsSpec>{{"x", DType::kUInt8, {4}}});
    EXPECT_EQ(files(), 2U);
  }
  EXPECT_EQ(files(), 1U);
  EXPECT_EQ(read("a"), "before");
}

TEST_F(IoSafetensors, ASignalHandlerRemovesWhatIsNotCommitted) {
  SafetensorsWriter writer(path("a"), std::vector<SafetensorsSpec>{{"x", DType::kUInt8, {4}}});
  EXPECT_EQ(files(), 1U);
  unlink_temporary_files();
  EXPECT_EQ(files(), 0U);
}

TEST_F(IoSafetensors, AFileHasTheModeOfAnyNewFile) {
  const mode_t mask = ::umask(0);
  ::umask(mask);
  AtomicFile file(path("a"));
  file.commit();
  struct stat status {};
  ASSERT_EQ(::stat(path("a").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0666 & ~mask);
}

TEST_F(IoSafetensors, HeaderLengthIsCheckedAgainstTheFile) {
  write("short", "1234567");
  EXPECT_THROW(SafetensorsFile(path("short")), InvalidArgument);
  write("huge", std::string(8, '\x7f') + "{}");
  EXPECT_THROW(SafetensorsFile(path("huge")), InvalidArgument);
  std::string cut = with_length("{}");
  cut.pop_back();
  write("cut", cut);
  EXPECT_THROW(SafetensorsFile(path("cut")), InvalidArgument);
  write("least", with_length("{}"));
  EXPECT_TRUE(SafetensorsFile(path("least")).header().tensors.empty());
  write("padded", with_length("{}     "));
  EXPECT_EQ(SafetensorsFile(path("padded")).header().data_offset, 15U);
}

TEST(IoSafetensorsHeader, RefusesWhatTheFormatForbids) {
  expect_refused("", 0, "does not start with");
  expect_refused(" {}", 0, "does not start with");
  expect_refused("{}x", 0, "not valid JSON");
  expect_refused("{\"a\":1}", 0, "a number");
  expect_refused("{\"a\":null}", 0, "null");
  expect_refused("{\"a\":{}}", 0, "no field");
  expect_refused("{\"__metadata__\":{\"a\":1}}", 0, "a number");
  expect_refused("{\"__metadata__\":[]}", 0, "a list");
  expect_refused("{\"a\":" + entry("F32", "[2]", "[0,8]") + "}", 7, "cut short");
  expect_refused("{\"a\":" + entry("F32", "[2]", "[0,8]") + "}", 9, "9 bytes of data");
  expect_refused("{\"a\":" + entry("F32", "[2]", "[0,9]") + "}", 9, "takes 8 bytes");
  expect_refused("{\"a\":" + entry("F32", "[2]", "[0]") + "}", 8, "two numbers");
  expect_refused("{\"a\":" + entry("F32", "[2.0]", "[0,8]") + "}", 8, "a fraction");
  expect_refused("{\"a\":" + entry("F32", "[-1]", "[0,8]") + "}", 8, "at least 0");
  expect_refused("{\"a\":" + entry("F32", "[[2]]", "[0,8]") + "}", 8, "a list");
  expect_refused("{\"a\":" + entry("F99", "[2]", "[0,8]") + "}", 8, "F8_E4M3");
  expect_refused("{\"a\":" + entry("F32", "[2]", "[4,12]") + "}", 12, "gaps");
  expect_refused(
      "{\"a\":" + entry("U8", "[4]", "[0,4]") + ",\"b\":" + entry("U8", "[4]", "[3,7]") + "}", 7,
      "overlaps");
  expect_refused("{\"a\":" + entry("U8", "[18446744073709551615]", "[0,0]") + "}", 0, "2^62");
  expect_refused("{\"a\":" + entry("F64", "[4611686018427387904]", "[0,0]") + "}", 0, "2^62");
  expect_refused("{\"a\":" + entry("U8", "[4294967296,4294967296]", "[0,0]") + "}", 0, "2^62");
  expect_refused("{\"a\":" + entry("U8", "[0]", "[18446744073709551615,0]") + "}", 0, "2^62");
  expect_refused("{\"\xff\":1}", 0, "not valid JSON");
}

TEST(IoSafetensorsHeader, TakesEmptyAndScalarTensorsInAnyOrder) {
  const std::string json = "{\"late\":" + entry("U8", "[]", "[8,9]") +
                           ",\"none\":" + entry("F32", "[7,0,9223372036854775807]", "[8,8]") +
                           ",\"early\":" + entry("I64", "[1,1]", "[0,8]") + "}";
  // The size beyond 2^62 is refused even beside a 0: no product of sizes may overflow later.
  expect_refused(json, 9, "2^62");
  const std::string good = "{\"late\":" + entry("U8", "[]", "[8,9]") +
                           ",\"none\":" + entry("F32", "[7,0,5]", "[8,8]") +
                           ",\"early\":" + entry("I64", "[1,1]", "[0,8]") + "}";
  const SafetensorsHeader header = parse_safetensors_header(good, 8 + good.size() + 9);
  ASSERT_EQ(header.tensors.size(), 3U);
  EXPECT_EQ(header.tensors[0].name, "early");
  EXPECT_EQ(header.tensors[2].name, "late");
  EXPECT_EQ(header.find("nobody"), nullptr);
}

TEST(IoSafetensorsHeader, MessagesShowOnlyAPartOfHostileNames) {
  const std::string name(100'000, 'n');
  try {
    static_cast<void>(parse_safetensors_header("{\"" + name + "\":{}}", 1'000'000));
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_LT(std::strlen(error.what()), 300U);
  }
}

TEST(IoSafetensorsHeader, DeepAndLongHeadersNeitherOverflowNorHang) {
  for (const std::string& open : {std::string("["), std::string("{\"a\":")}) {
    std::string json = "{\"a\":";
    for (int i = 0; i < 1'000'000; ++i) json += open;
    EXPECT_THROW(static_cast<void>(parse_safetensors_header(json, 8 + json.size())),
                 InvalidArgument);
  }
  std::string many = "{";
  for (int i = 0; i < 100'000; ++i) {
    many += std::string("\"").append(std::to_string(i)) + "\":" + entry("U8", "[0]", "[0,0]") + ",";
  }
  many.back() = '}';
  EXPECT_EQ(parse_safetensors_header(many, 8 + many.size()).tensors.size(), 100'000U);
}

TEST(IoSafetensorsHeader, EveryCutOfAValidHeaderIsRefused) {
  const std::string json =
      "{\"__metadata__\":{\"a\":\"b\"},\"x\":" + entry("BF16", "[2,3]", "[0,12]") + "}";
  EXPECT_NO_THROW(static_cast<void>(parse_safetensors_header(json, 8 + json.size() + 12)));
  for (std::size_t length = 0; length < json.size(); ++length) {
    EXPECT_THROW(
        static_cast<void>(parse_safetensors_header(json.substr(0, length), 8 + length + 12)),
        InvalidArgument)
        << length;
  }
}

TEST(IoAtomicFile, SaysWhyItCannotWrite) {
  const auto reason = [](const std::string& path) -> std::string {
    try {
      check_writable(path, "--output");
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(reason(""), HasSubstr("empty"));
  EXPECT_THAT(reason("/"), HasSubstr("folder"));
  EXPECT_THAT(reason("/dev/null"), HasSubstr("regular file"));
  EXPECT_THAT(reason("/no/such/folder/file"), HasSubstr("does not exist"));
  EXPECT_THAT(reason(std::string(300, 'x')), HasSubstr("at most 200"));
}

}  // namespace
}  // namespace zigzag::io
