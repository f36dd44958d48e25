// files.h - reading, hashing and atomically writing files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sha256.h"

namespace lococo {

class InputFile {
 public:
  explicit InputFile(std::string path);  // of a regular file. NOT_FOUND or IO
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  [[nodiscard]] uint64_t size() const { return size_; }  // when it was opened
  // Up to size bytes; fewer only at the end of the file.
  size_t read(void* data, size_t size);

 private:
  std::string path_;
  int fd_;
  uint64_t size_ = 0;
};

Digest sha256_file(const std::string& path);

// Writes a file beside path, fsyncs it and renames it to path; on failure path is as it was. IO, NO_SPACE, NOT_FOUND.
void write_file_atomically(const std::string& path, const std::vector<uint8_t>& bytes);

// Removes a file, durably; one that is gone already is no error. IO.
void remove_file(const std::string& path);

// Held by one object of one process at a time, and by none that has died.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::string& directory);  // BUSY, NOT_FOUND, IO, NO_SPACE
  ~DirectoryLock();
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;

 private:
  int fd_;
};

}  // namespace lococo
