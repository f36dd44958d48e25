// error.h - the one exception type of the library, and log lines. Texts say what was expected, what came, what to do.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <string>
#include <utility>

#include "lococo.h"

namespace lococo {

class Error : public std::exception {
 public:
  Error(lococo_status status, std::string text) : status_(status), text_(std::move(text)) {}
  [[nodiscard]] lococo_status status() const noexcept { return status_; }
  [[nodiscard]] const char* what() const noexcept override { return text_.c_str(); }

 private:
  lococo_status status_;
  std::string text_;
};

inline std::string vformat(const char* format, va_list args) {
  va_list again;
  va_copy(again, args);
  const int length = std::vsnprintf(nullptr, 0, format, args);
  std::string text(length > 0 ? static_cast<size_t>(length) : 0, '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

[[gnu::format(printf, 1, 2)]] inline std::string format(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = vformat(format, args);
  va_end(args);
  return text;
}

[[noreturn, gnu::format(printf, 2, 3)]] inline void fail(lococo_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = vformat(format, args);
  va_end(args);
  throw Error(status, std::move(text));
}

// To the process's log callback, if any. Defined in lococo.cc.
void log_line(lococo_log_level level, const std::string& text) noexcept;

}  // namespace lococo
