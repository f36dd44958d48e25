// check.h - all that these tests need of a framework: checks that say where and what, and a count at the end.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "error.h"

inline std::atomic<int> checks_done{0};  // tests check from several threads
inline std::atomic<int> checks_failed{0};

inline void check(bool ok, const char* file, int line, const std::string& text) {
  ++checks_done;
  if (ok) return;
  ++checks_failed;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
}

template <typename A, typename B>
void check_eq(const A& got, const B& expected, const char* file, int line, const char* text) {
  std::ostringstream message;
  message << text << ": expected " << expected << ", got " << got;
  check(got == expected, file, line, message.str());
}

// body must throw a lococo::Error of this status whose text contains every part.
template <typename F>
void check_error(lococo_status status, const std::vector<const char*>& parts, F&& body, const char* file, int line) {
  try {
    body();
  } catch (const lococo::Error& e) {
    const std::string text = e.what();
    check(e.status() == status, file, line,
          "expected status " + std::to_string(status) + ", got " + std::to_string(e.status()) + ": " + text);
    for (const char* part : parts) {
      check(text.find(part) != std::string::npos, file, line, "expected \"" + std::string(part) + "\" in: " + text);
    }
    return;
  }
  check(false, file, line, "expected an error of status " + std::to_string(status) + ", got none");
}

template <typename... Parts>
std::vector<const char*> parts_of(Parts... parts) {
  return {parts...};
}

#define CHECK(condition) check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(got, expected) check_eq(got, expected, __FILE__, __LINE__, #got)
#define CHECK_ERROR(status, parts, ...) check_error(status, parts_of parts, [&] { __VA_ARGS__; }, __FILE__, __LINE__)

// Ends main.
inline int finish() {
  std::printf("%d checks, %d failed\n", checks_done.load(), checks_failed.load());
  return checks_failed == 0 && checks_done > 0 ? 0 : 1;
}

// A directory that goes with the object.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "lococo-test-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
