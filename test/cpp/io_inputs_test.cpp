// Documents and seeded inputs: the same bits on every machine and for every split into ranks.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "half.h"
#include "io/deterministic_math.h"
#include "io/documents.h"
#include "io/generate.h"
#include "zigzag/error.h"

namespace zigzag::io {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(IoMath, AgreesWithTheStandardLibrary) {
  for (int i = 1; i <= 200'000; ++i) {
    const double x = i / 200'000.0;
    EXPECT_NEAR(portable_log(x), std::log(x), 4e-16 * (1 + std::abs(std::log(x)))) << x;
    const double y = (i - 100'000) / 1'000.0;
    EXPECT_NEAR(portable_exp(y) / std::exp(y), 1, 4e-15) << y;
    const double turns = (i - 100'000) / 777.0;
    const double fraction = turns - std::floor(turns);
    const auto [sine, cosine] = portable_sin_cos(turns);
    EXPECT_NEAR(sine, std::sin(2 * M_PI * fraction), 2e-15) << turns;
    EXPECT_NEAR(cosine, std::cos(2 * M_PI * fraction), 2e-15) << turns;
  }
  EXPECT_TRUE(std::isfinite(portable_log(0x1p-33)));
}

TEST(IoGenerate, AnyPieceHasTheBitsOfTheWhole) {
  for (const DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t row : {1, 2, 7, 64}) {
      const auto row_bytes = static_cast<std::size_t>(row * item_size(type));
      std::vector<std::byte> whole(100 * row_bytes);
      fill_normal(3, Stream::kK, 0, 100, row, type, whole.data());
      for (const std::int64_t begin : {0, 1, 37, 99}) {
        const std::int64_t rows = std::min<std::int64_t>(20, 100 - begin);
        std::vector<std::byte> piece(static_cast<std::size_t>(rows) * row_bytes);
        fill_normal(3, Stream::kK, begin, rows, row, type, piece.data());
        EXPECT_EQ(
            0, std::memcmp(piece.data(), whole.data() + static_cast<std::size_t>(begin) * row_bytes,
                           piece.size()));
      }
    }
  }
}

TEST(IoGenerate, NumbersAreStandardNormalAndStreamsIndependent) {
  constexpr std::int64_t kCount = 1 << 20;
  const auto draw = [](std::uint64_t seed, Stream stream) {
    std::vector<float> values(kCount);
    fill_normal(seed, stream, 0, kCount / 64, 64, DType::kFloat32, values.data());
    return values;
  };
  const auto correlation = [](const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
    return sum / static_cast<double>(a.size());
  };
  const std::vector<float> q = draw(0, Stream::kQ);
  double mean = 0;
  double fourth = 0;
  double largest = 0;
  for (const float x : q) {
    ASSERT_TRUE(std::isfinite(x));
    mean += x;
    fourth += std::pow(x, 4);
    largest = std::max(largest, std::abs(static_cast<double>(x)));
  }
  EXPECT_NEAR(mean / kCount, 0, 0.005);
  EXPECT_NEAR(correlation(q, q), 1, 0.01);
  EXPECT_NEAR(fourth / kCount, 3, 0.05);
  EXPECT_GT(largest, 4.2);
  EXPECT_LT(largest, 7);
  EXPECT_NEAR(correlation(q, draw(0, Stream::kK)), 0, 0.005);
  EXPECT_NEAR(correlation(q, draw(1, Stream::kQ)), 0, 0.005);
  std::vector<float> shifted(q.begin() + 1, q.end());
  shifted.push_back(0);
  EXPECT_NEAR(correlation(q, shifted), 0, 0.005);
}

// A change of these bits changes every seeded result that anybody wrote down.
TEST(IoGenerate, BitsOfTheSeedAreFixed) {
  std::vector<float> values(4);
  fill_normal(42, Stream::kV, 1'000'000'007, 1, 4, DType::kFloat32, values.data());
  std::vector<std::uint32_t> bits(4);
  std::memcpy(bits.data(), values.data(), 16);
  EXPECT_THAT(bits, ElementsAre(1059711738U, 1062403362U, 3212671516U, 3205344086U));
}

TEST(IoGenerate, RefusesTypesThatAttentionLacks) {
  std::int64_t out = 0;
  EXPECT_THROW(fill_normal(0, Stream::kQ, 0, 1, 1, DType::kInt64, &out), InvalidArgument);
}

TEST(IoByteModel, DotProductsDependOnRelativePositionAlone) {
  const ByteModel model(9, {2, 1, 16});
  const std::vector<std::uint8_t> token{65};
  const auto row = [&](Stream stream, std::int64_t position) {
    std::vector<float> out(stream == Stream::kQ ? 32 : 16);
    model.fill(stream, token, position, DType::kFloat32, out.data());
    return out;
  };
  const auto dot = [&](std::int64_t i, std::int64_t j) {
    const std::vector<float> q = row(Stream::kQ, i);
    const std::vector<float> k = row(Stream::kK, j);
    double sum = 0;
    for (std::size_t c = 0; c < 16; ++c) sum += static_cast<double>(q[c]) * k[c];
    return sum;
  };
  EXPECT_NEAR(dot(5, 2), dot(1005, 1002), 1e-4);
  EXPECT_GT(std::abs(dot(5, 2) - dot(5, 4)), 1e-3);
  EXPECT_EQ(row(Stream::kV, 0), row(Stream::kV, 77));
  EXPECT_EQ(row(Stream::kQ, 3), row(Stream::kQ, 3));
}

TEST(IoByteModel, ARunHasTheBitsOfItsTokens) {
  const ByteModel model(1, {3, 3, 10});
  const std::vector<std::uint8_t> tokens{0, 255, 7, 7, 128};
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    const auto row_bytes = static_cast<std::size_t>(30 * item_size(type));
    std::vector<std::byte> whole(tokens.size() * row_bytes);
    std::vector<std::byte> single(row_bytes);
    model.fill(Stream::kQ, tokens, 100, type, whole.data());
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      model.fill(Stream::kQ, std::span(tokens).subspan(t, 1), 100 + static_cast<std::int64_t>(t),
                 type, single.data());
      EXPECT_EQ(0, std::memcmp(single.data(), whole.data() + t * row_bytes, row_bytes)) << t;
    }
  }
  EXPECT_THROW(model.fill(Stream::kDOut, tokens, 0, DType::kFloat32, nullptr), InvalidArgument);
}

class IoDocuments : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "zigzag_docs_XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
    fs::create_directories(folder_ / "b" / "c");
    for (const auto& [file, text] : std::vector<std::pair<std::string, std::string>>{
             {"b/z", "zz"}, {"b/c/y", "yyy"}, {"a", "a"}, {"empty", ""}, {"b.txt", "bbbb"}}) {
      std::ofstream(folder_ / file) << text;
    }
  }
  void TearDown() override { fs::remove_all(folder_); }

  DocumentList list(std::int64_t limit = -1) const {
    return list_documents(std::vector<std::string>{folder_.string()}, limit);
  }

  fs::path folder_;
};

TEST_F(IoDocuments, AFolderIsItsFilesInTheOrderOfTheirPaths) {
  const DocumentList found = list();
  std::vector<std::string> names;
  for (const std::string& name : found.names) {
    names.push_back(fs::relative(name, folder_).string());
  }
  EXPECT_THAT(names, ElementsAre("a", "b/c/y", "b/z", "b.txt", "empty"));
  EXPECT_THAT(found.cu_seqlens, ElementsAre(0, 1, 4, 6, 10, 10));
  const std::vector<std::uint8_t> tokens = read_tokens(found);
  EXPECT_EQ(std::string(tokens.begin(), tokens.end()), "ayyyzzbbbb");
  EXPECT_TRUE(found.notes.empty());
}

TEST_F(IoDocuments, TheLimitCutsAndSaysSo) {
  const DocumentList found = list(5);
  EXPECT_THAT(found.cu_seqlens, ElementsAre(0, 1, 4, 5));
  ASSERT_EQ(found.notes.size(), 2U);
  EXPECT_THAT(found.notes[0], HasSubstr("after 1 of 2 bytes"));
  EXPECT_THAT(found.notes[1], HasSubstr("left out 2 of 5 documents"));
  EXPECT_EQ(read_tokens(found).size(), 5U);
}

TEST_F(IoDocuments, AFileThatShrankIsAnError) {
  const DocumentList found = list();
  fs::resize_file(folder_ / "b.txt", 1);
  EXPECT_THROW(static_cast<void>(read_tokens(found)), InvalidArgument);
  fs::remove(folder_ / "b.txt");
  EXPECT_THROW(static_cast<void>(read_tokens(found)), InvalidArgument);
}

TEST(IoHalf, EveryHalfSurvivesAndHalvesRoundToEven) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float f16 = from_float16(half);
    const float b16 = from_bfloat16(half);
    if (!std::isnan(f16)) {
      EXPECT_EQ(to_float16(f16), half);
    }
    if (!std::isnan(b16)) {
      EXPECT_EQ(to_bfloat16(b16), half);
    }
    EXPECT_EQ(std::isnan(f16), std::isnan(from_float16(to_float16(f16))));
    EXPECT_EQ(std::isnan(b16), std::isnan(from_bfloat16(to_bfloat16(b16))));
    // Halfway between two neighbours the even one wins; just beyond, the nearer.
    if (bits >= 0x7bff) continue;
    const float next = from_float16(static_cast<std::uint16_t>(bits + 1));
    const float middle = f16 + (next - f16) / 2;
    EXPECT_EQ(to_float16(middle), bits % 2 == 0 ? bits : bits + 1) << bits;
    EXPECT_EQ(to_float16(std::nextafter(middle, 1e9F)), bits + 1) << bits;
    EXPECT_EQ(to_float16(std::nextafter(middle, -1e9F)), bits) << bits;
  }
  EXPECT_EQ(to_float16(65519.0F), 0x7bff);
  EXPECT_EQ(to_float16(65520.0F), 0x7c00);
}

}  // namespace
}  // namespace zigzag::io
