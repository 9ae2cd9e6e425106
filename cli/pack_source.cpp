#include "pack_source.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "agreement.h"
#include "io/documents.h"
#include "io/safetensors.h"
#include "zigzag/error.h"

namespace zigzag::cli {
namespace {

std::int64_t heads_of(io::Stream stream, const io::ModelShape& shape) {
  return stream == io::Stream::kK || stream == io::Stream::kV ? shape.kv_heads : shape.heads;
}

io::ModelShape model_shape(const ShapeOptions& shape) {
  shape.check();
  return {shape.heads, shape.kv_heads, shape.head_dim};
}

// Everything drawn from the seed by global token.
class SeededSource : public PackSource {
 public:
  SeededSource(const PackOptions& pack, const ShapeOptions& shape)
      : seed_(static_cast<std::uint64_t>(pack.seed)) {
    shape_ = model_shape(shape);
    dtype_ = shape.type();
    PackLengths lengths = read_lengths(pack);
    cu_seqlens_ = std::move(lengths.cu_seqlens);
    notes_ = std::move(lengths.notes);
  }

  void fill(io::Stream stream, const Run& run, void* out) const override {
    io::fill_normal(seed_, stream, run.token, run.rows, heads_of(stream, shape_) * shape_.head_dim,
                    dtype_, out);
  }

 protected:
  std::uint64_t seed_;
};

// Bytes of files through a byte model; dout from the seed.
class DocumentSource : public SeededSource {
 public:
  DocumentSource(const PackOptions& pack, const ShapeOptions& shape) : SeededSource(pack, shape) {
    io::DocumentList list = io::list_documents(pack.documents, pack.max_tokens);
    tokens_ = io::read_tokens(list);
    cu_seqlens_ = std::move(list.cu_seqlens);
    model_ = std::make_unique<io::ByteModel>(seed_, shape_);
  }

  void fill(io::Stream stream, const Run& run, void* out) const override {
    if (stream == io::Stream::kDOut) {
      SeededSource::fill(stream, run, out);
      return;
    }
    const auto tokens = std::span(tokens_).subspan(static_cast<std::size_t>(run.token),
                                                   static_cast<std::size_t>(run.rows));
    model_->fill(stream, tokens, run.position, dtype_, out);
  }

  std::uint64_t contents() const override {
    Fingerprint fingerprint;
    fingerprint.add(std::as_bytes(std::span(tokens_)));
    return fingerprint.value();
  }

 private:
  std::vector<std::uint8_t> tokens_;
  std::unique_ptr<io::ByteModel> model_;
};

// Tensors of a safetensors file.
class FileSource : public PackSource {
 public:
  FileSource(const PackOptions& pack, const ShapeOptions& shape)
      : file_(pack.input), seed_(static_cast<std::uint64_t>(pack.seed)) {
    if (pack.max_tokens >= 0) {
      throw InvalidArgument("--max-tokens does not go with --input, whose tensors are taken whole");
    }
    q_ = &entry("q");
    k_ = &entry("k");
    v_ = &entry("v");
    dout_ = file_.header().find("dout");
    for (const io::SafetensorsEntry* tensor : {q_, k_, v_}) check_dims(*tensor);
    if (!q_->dtype || !is_attention_dtype(*q_->dtype)) {
      fail("tensor 'q' is {}; F32, F16 and BF16 are allowed", q_->dtype_text);
    }
    dtype_ = *q_->dtype;
    shape_ = {q_->shape[1], k_->shape[1], q_->shape[2]};
    check_like(*k_, {q_->shape[0], k_->shape[1], shape_.head_dim});
    check_like(*v_, k_->shape);
    if (dout_ != nullptr) check_like(*dout_, q_->shape);
    if (shape_.kv_heads < 1 || shape_.heads < 1 || shape_.heads % shape_.kv_heads != 0) {
      fail("'q' has {} heads and 'k' {}; the heads of k must divide those of q", shape_.heads,
           shape_.kv_heads);
    }
    read_cu_seqlens();
    check_flags(shape);
    has_dout_ = dout_ != nullptr;
    wants_backward_ = has_dout_;
  }

  void fill(io::Stream stream, const Run& run, void* out) const override {
    const std::int64_t elements = heads_of(stream, shape_) * shape_.head_dim;
    if (stream == io::Stream::kDOut && dout_ == nullptr) {
      io::fill_normal(seed_, stream, run.token, run.rows, elements, dtype_, out);
      return;
    }
    const io::SafetensorsEntry* tensor = stream == io::Stream::kQ   ? q_
                                         : stream == io::Stream::kK ? k_
                                         : stream == io::Stream::kV ? v_
                                                                    : dout_;
    const std::int64_t row_bytes = elements * item_size(dtype_);
    file_.read(
        *tensor, static_cast<std::uint64_t>(run.token * row_bytes),
        std::span(static_cast<std::byte*>(out), static_cast<std::size_t>(run.rows * row_bytes)));
  }

  std::uint64_t contents() const override {
    constexpr std::uint64_t kPiece = std::uint64_t{1} << 20;
    constexpr std::uint64_t kPieces = 64;
    Fingerprint fingerprint;
    std::vector<std::byte> piece;
    for (const io::SafetensorsEntry* tensor : {q_, k_, v_, dout_}) {
      const std::uint64_t bytes = tensor == nullptr ? 0 : tensor->end - tensor->begin;
      const std::uint64_t pieces = std::min((bytes + kPiece - 1) / kPiece, kPieces);
      for (std::uint64_t i = 0; i < pieces; ++i) {
        // Below the limit these are all bytes, piece after piece; above it they lie evenly spread.
        const std::uint64_t at =
            bytes <= kPiece * kPieces ? i * kPiece : (bytes - kPiece) / (kPieces - 1) * i;
        piece.resize(std::min(kPiece, bytes - at));
        file_.read(*tensor, at, piece);
        fingerprint.add(piece);
      }
      fingerprint.add({});
    }
    return fingerprint.value();
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw InvalidArgument(fmt::format("--input '{}': {}", file_.path(),
                                      fmt::format(format, std::forward<Args>(args)...)));
  }

  const io::SafetensorsEntry& entry(std::string_view name) const {
    const io::SafetensorsEntry* found = file_.header().find(name);
    if (found == nullptr) {
      fail("there is no tensor '{}'; q, k, v and cu_seqlens are wanted", name);
    }
    return *found;
  }

  void check_dims(const io::SafetensorsEntry& tensor) const {
    if (tensor.shape.size() == 3) return;
    fail("tensor '{}' has shape {}; [tokens, heads, head_dim] is wanted", tensor.name,
         shape_text(tensor.shape));
  }

  void check_like(const io::SafetensorsEntry& tensor,
                  const std::vector<std::int64_t>& shape) const {
    if (tensor.dtype_text != q_->dtype_text) {
      fail("tensor '{}' is {} and 'q' is {}; they must be of one type", tensor.name,
           tensor.dtype_text, q_->dtype_text);
    }
    if (tensor.shape != shape) {
      fail("tensor '{}' has shape {}; {} is wanted", tensor.name, shape_text(tensor.shape),
           shape_text(shape));
    }
  }

  void read_cu_seqlens() {
    const io::SafetensorsEntry& tensor = entry("cu_seqlens");
    const bool wide = tensor.dtype == DType::kInt64;
    if (!wide && tensor.dtype != DType::kInt32) {
      fail("tensor 'cu_seqlens' is {}; I32 and I64 are allowed", tensor.dtype_text);
    }
    if (tensor.shape.size() != 1 || tensor.shape[0] < 1) {
      fail("tensor 'cu_seqlens' has shape {}; [documents + 1] is wanted", shape_text(tensor.shape));
    }
    const auto count = static_cast<std::size_t>(tensor.shape[0]);
    cu_seqlens_.resize(count);
    if (wide) {
      file_.read(tensor, 0, std::as_writable_bytes(std::span(cu_seqlens_)));
    } else {
      std::vector<std::int32_t> narrow(count);
      file_.read(tensor, 0, std::as_writable_bytes(std::span(narrow)));
      cu_seqlens_.assign(narrow.begin(), narrow.end());
    }
    if (cu_seqlens_.front() != 0)
      fail("cu_seqlens starts at {}; it must be 0", cu_seqlens_.front());
    for (std::size_t i = 1; i < count; ++i) {
      if (cu_seqlens_[i] < cu_seqlens_[i - 1]) {
        fail("cu_seqlens falls from {} to {} at index {}; it must not decrease", cu_seqlens_[i - 1],
             cu_seqlens_[i], i);
      }
    }
    if (cu_seqlens_.back() != q_->shape[0]) {
      fail("cu_seqlens ends at {}, but 'q' has {} tokens; they must be equal", cu_seqlens_.back(),
           q_->shape[0]);
    }
  }

  // A flag that says something else than the file is a mistake, not a wish.
  void check_flags(const ShapeOptions& shape) const {
    const auto check = [&](const CLI::Option* option, std::int64_t given, std::int64_t actual) {
      if (option == nullptr || option->count() == 0 || given == actual) return;
      fail("{} is {}, but the file has {}; leave it out or give the same", option->get_name(),
           given, actual);
    };
    check(shape.heads_given, shape.heads, shape_.heads);
    check(shape.kv_heads_given, shape.kv_heads, shape_.kv_heads);
    check(shape.head_dim_given, shape.head_dim, shape_.head_dim);
    if (shape.dtype_given != nullptr && shape.dtype_given->count() > 0 && shape.type() != dtype_) {
      fail("--dtype is {}, but the file has {}; leave it out or give the same", shape.dtype,
           dtype_name(dtype_));
    }
  }

  io::SafetensorsFile file_;
  std::uint64_t seed_;
  const io::SafetensorsEntry* q_ = nullptr;
  const io::SafetensorsEntry* k_ = nullptr;
  const io::SafetensorsEntry* v_ = nullptr;
  const io::SafetensorsEntry* dout_ = nullptr;
};

}  // namespace

std::vector<Run> rank_runs(const Plan& plan, std::int64_t rank) {
  std::vector<Run> runs;
  const auto [early, late] = plan.chunk_indices(rank);
  for (std::int64_t d = 0; d < plan.num_documents(); ++d) {
    const std::int64_t base = plan.cu_seqlens()[static_cast<std::size_t>(d)];
    for (const std::int64_t index : {early, late}) {
      const Chunk chunk = plan.chunk(d, index);
      if (chunk.begin == chunk.end) continue;
      runs.push_back(
          {base + chunk.begin, chunk.begin, d, chunk.local_row, chunk.end - chunk.begin});
    }
  }
  return runs;
}

TensorMemory PackSource::load(io::Stream stream, const std::vector<Run>& runs) const {
  const std::int64_t rows = runs.empty() ? 0 : runs.back().row + runs.back().rows;
  TensorMemory tensor(dtype_, {rows, heads_of(stream, shape_), shape_.head_dim});
  for (const Run& run : runs) fill(stream, run, tensor.row(run.row));
  return tensor;
}

std::unique_ptr<PackSource> open_source(const PackOptions& pack, const ShapeOptions& shape) {
  pack.check();
  if (!pack.input.empty()) return std::make_unique<FileSource>(pack, shape);
  if (!pack.documents.empty()) return std::make_unique<DocumentSource>(pack, shape);
  return std::make_unique<SeededSource>(pack, shape);
}

}  // namespace zigzag::cli
