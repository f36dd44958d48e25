#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace lococo {
namespace {

[[noreturn]] void fail_errno(int code, const std::string& path, const char* action) {
  const std::string reason = format("%s: cannot %s: %s (errno %d)", path.c_str(), action, std::strerror(code), code);
  if (code == ENOENT || code == ENOTDIR) fail(LOCOCO_ERROR_NOT_FOUND, "%s; check the path", reason.c_str());
  if (code == ENOSPC || code == EDQUOT) {
    fail(LOCOCO_ERROR_NO_SPACE, "%s; free some space or choose another target", reason.c_str());
  }
  fail(LOCOCO_ERROR_IO, "%s; check the permissions and the disk", reason.c_str());
}

int open_retrying(const char* path, int flags, mode_t mode = 0) {
  int fd = -1;
  do {
    fd = ::open(path, flags | O_CLOEXEC, mode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

// 0, or the errno of the step that failed.
int write_and_sync(int fd, const uint8_t* data, size_t size) {
  while (size > 0) {
    const ssize_t n = ::write(fd, data, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    data += n;
    size -= static_cast<size_t>(n);
  }
  return ::fsync(fd) == 0 ? 0 : errno;
}

// A rename or a removal is durable once the directory is; a file system that cannot sync a directory has still done it.
void sync_directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  if (const int dir = open_retrying(directory.c_str(), O_RDONLY | O_DIRECTORY); dir >= 0) {
    ::fsync(dir);
    ::close(dir);
  }
}

}  // namespace

// Not waiting: a pipe without a writer would never open.
InputFile::InputFile(std::string path)
    : path_(std::move(path)), fd_(open_retrying(path_.c_str(), O_RDONLY | O_NONBLOCK)) {
  if (fd_ < 0) fail_errno(errno, path_, "open");
  struct stat info = {};
  const int code = ::fstat(fd_, &info) == 0 ? 0 : errno;
  if (code == 0 && S_ISREG(info.st_mode)) {
    size_ = static_cast<uint64_t>(info.st_size);
    return;
  }
  ::close(fd_);
  if (code != 0) fail_errno(code, path_, "stat");
  fail(LOCOCO_ERROR_IO, "%s: expected a regular file; check the path", path_.c_str());
}

InputFile::~InputFile() { ::close(fd_); }

size_t InputFile::read(void* data, size_t size) {
  size_t done = 0;
  while (done < size) {
    const ssize_t n = ::read(fd_, static_cast<uint8_t*>(data) + done, size - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno(errno, path_, "read");
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

Digest sha256_file(const std::string& path) {
  InputFile file(path);
  std::vector<uint8_t> piece(1 << 20);
  Sha256 sha;
  while (const size_t n = file.read(piece.data(), piece.size())) sha.update(piece.data(), n);
  return sha.digest();
}

void write_file_atomically(const std::string& path, const std::vector<uint8_t>& bytes) {
  // A rename would replace a device node such as /dev/full by a file.
  struct stat existing = {};
  if (::stat(path.c_str(), &existing) == 0 && !S_ISREG(existing.st_mode))
    fail(LOCOCO_ERROR_IO, "%s: exists and is no regular file; choose another path", path.c_str());
  static std::atomic<unsigned> counter{0};
  const std::string staging = format("%s.%d-%u.tmp", path.c_str(), static_cast<int>(::getpid()), counter++);
  const int fd = open_retrying(staging.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
  if (fd < 0) fail_errno(errno, staging, "create");
  int code = write_and_sync(fd, bytes.data(), bytes.size());
  if (::close(fd) != 0 && code == 0) code = errno;
  if (code == 0 && ::rename(staging.c_str(), path.c_str()) != 0) code = errno;
  if (code != 0) {
    ::unlink(staging.c_str());
    fail_errno(code, path, "write");
  }
  sync_directory_of(path);
}

void remove_file(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail_errno(errno, path, "remove");
  sync_directory_of(path);
}

DirectoryLock::DirectoryLock(const std::string& directory) {
  const std::string path = directory + "/.lock";
  fd_ = open_retrying(path.c_str(), O_RDWR | O_CREAT, 0666);
  if (fd_ < 0) fail_errno(errno, path, "open");
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) return;
  const int code = errno;
  ::close(fd_);
  if (code == EWOULDBLOCK) {
    fail(LOCOCO_ERROR_BUSY, "%s: in use by another pool, of this process or of another one; choose another directory",
         directory.c_str());
  }
  fail_errno(code, path, "lock");
}

DirectoryLock::~DirectoryLock() { ::close(fd_); }

}  // namespace lococo
