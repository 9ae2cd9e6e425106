#pragma once

namespace zigzag::cli {

/// The most memory that this process had resident so far, in bytes; 0 where the system does not
/// tell.
double peak_resident_bytes();

/// Memory of this machine in bytes; 0 where the system does not tell.
double machine_memory_bytes();

}  // namespace zigzag::cli
