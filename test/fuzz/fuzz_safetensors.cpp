// A whole safetensors file as the fuzzer makes it: the header must be refused with a sentence or
// hold every promise of SafetensorsHeader, and each tensor must be readable.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>
#include <span>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "io/safetensors.h"
#include "zigzag/error.h"

namespace {

using zigzag::io::SafetensorsEntry;
using zigzag::io::SafetensorsFile;

void require(bool condition) {
  if (!condition) std::abort();
}

void check_promises(const zigzag::io::SafetensorsHeader& header, std::uint64_t file_bytes) {
  std::set<std::string> names;
  std::uint64_t covered = 0;
  for (const SafetensorsEntry& entry : header.tensors) {
    require(names.insert(entry.name).second);
    require(entry.begin == covered && entry.end >= entry.begin);
    covered = entry.end;
    if (!entry.dtype) continue;
    std::uint64_t bytes = static_cast<std::uint64_t>(zigzag::item_size(*entry.dtype));
    for (const std::int64_t size : entry.shape) bytes *= static_cast<std::uint64_t>(size);
    require(bytes == entry.end - entry.begin);
  }
  require(header.data_offset + covered == file_bytes);
}

// The file lives in memory: SafetensorsFile opens it by its descriptor's path.
void open_and_read(std::span<const std::uint8_t> input) {
  const int descriptor = ::memfd_create("fuzz", MFD_CLOEXEC);
  require(descriptor >= 0);
  require(input.empty() ||
          ::write(descriptor, input.data(), input.size()) == static_cast<ssize_t>(input.size()));
  const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
  try {
    const SafetensorsFile file(path);
    check_promises(file.header(), input.size());
    for (const SafetensorsEntry& entry : file.header().tensors) {
      std::vector<std::byte> bytes(entry.end - entry.begin);
      file.read(entry, 0, bytes);
      require(bytes.empty() ||
              std::memcmp(bytes.data(), input.data() + file.header().data_offset + entry.begin,
                          bytes.size()) == 0);
    }
  } catch (const zigzag::InvalidArgument& error) {
    require(std::strlen(error.what()) > 0 && std::strlen(error.what()) < 2000);
  }
  ::close(descriptor);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  open_and_read({data, size});
  // Most mutations break the 8 bytes of length; the header alone reaches deeper.
  const std::string json(reinterpret_cast<const char*>(data), size);
  try {
    check_promises(zigzag::io::parse_safetensors_header(json, 8 + size), 8 + size);
  } catch (const zigzag::InvalidArgument&) {
  }
  try {
    check_promises(zigzag::io::parse_safetensors_header(json, 8 + size + 64), 8 + size + 64);
  } catch (const zigzag::InvalidArgument&) {
  }
  return 0;
}
