#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace zigzag::io {

/// A pack made of files: their bytes are the tokens, one document a file.
struct DocumentList {
  std::vector<std::string> names;        // [documents]
  std::vector<std::int64_t> cu_seqlens;  // [documents + 1]
  /// What was left out and why, one sentence each: files that are not regular, files and bytes
  /// beyond max_tokens.
  std::vector<std::string> notes;
};

/// Lists files, and folders recursively in the order of their names, without reading them; links
/// to folders are not followed. An empty file is an empty document. At most max_tokens bytes are
/// taken: the document that crosses the limit is cut and the rest left out (negative: no limit).
/// Throws InvalidArgument when there is no path, when one is missing or unreadable, or when no
/// document is found.
DocumentList list_documents(std::span<const std::string> paths, std::int64_t max_tokens);

/// The bytes of all documents, end to end [cu_seqlens.back()]. Throws InvalidArgument when a file
/// cannot be read or has become shorter since it was listed.
std::vector<std::uint8_t> read_tokens(const DocumentList& list);

}  // namespace zigzag::io
