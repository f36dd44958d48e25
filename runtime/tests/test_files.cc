#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "check.h"
#include "files.h"

namespace {

std::atomic<int> write_errno{0};
std::atomic<size_t> most_at_once{SIZE_MAX};

}  // namespace

// Stands before the C library's: a disk that is full, or that writes a little at a time, at will.
extern "C" ssize_t write(int fd, const void* data, size_t size) {
  if (fd > 2 && write_errno != 0) {
    errno = write_errno;
    return -1;
  }
  return syscall(SYS_write, fd, data, fd > 2 ? std::min<size_t>(size, most_at_once) : size);
}

int main() {
  const TempDir dir;
  const std::string path = dir / "state";
  const auto entries = [&] {
    return std::distance(std::filesystem::directory_iterator(dir.path()), std::filesystem::directory_iterator());
  };
  std::vector<uint8_t> bytes(3'000'000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 31 >> 3);
  lococo::write_file_atomically(path, bytes);
  CHECK(read_text(path) == std::string(bytes.begin(), bytes.end()));
  bytes.resize(1000);
  most_at_once = 7;
  lococo::write_file_atomically(path, bytes);  // replaces
  most_at_once = SIZE_MAX;
  CHECK(read_text(path) == std::string(bytes.begin(), bytes.end()));

  write_errno = ENOSPC;
  CHECK_ERROR(LOCOCO_ERROR_NO_SPACE, (path.c_str(), "free some space"), lococo::write_file_atomically(path, {1, 2, 3}));
  write_errno = EIO;
  CHECK_ERROR(LOCOCO_ERROR_IO, (path.c_str()), lococo::write_file_atomically(path, {1, 2, 3}));
  write_errno = 0;
  CHECK(read_text(path) == std::string(bytes.begin(), bytes.end()));  // the old file, whole
  CHECK_EQ(entries(), 1);                                             // and nothing half-made beside it

  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("nowhere"), lococo::write_file_atomically(dir / "nowhere/state", bytes));
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("state/state"), lococo::write_file_atomically(dir / "state/state", bytes));
  std::filesystem::create_directory(dir / "folder");
  CHECK_ERROR(LOCOCO_ERROR_IO, ("folder"), lococo::write_file_atomically(dir / "folder", bytes));
  CHECK_EQ(entries(), 2);

  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("absent"), lococo::InputFile(dir / "absent"));
  CHECK_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
  for (const char* name : {"folder", "pipe"}) {  // at once: nobody writes to the pipe
    CHECK_ERROR(LOCOCO_ERROR_IO, ("regular file"), lococo::InputFile(dir / name));
  }
  lococo::InputFile file(path);
  CHECK_EQ(file.size(), 1000u);
  std::vector<uint8_t> back(2000);
  CHECK_EQ(file.read(back.data(), back.size()), 1000u);
  CHECK_EQ(lococo::to_hex(lococo::sha256_file(dir / "state")).size(), 64u);
  write_text(dir / "abc", "abc");
  CHECK_EQ(lococo::to_hex(lococo::sha256_file(dir / "abc")),
           "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  return finish();
}
