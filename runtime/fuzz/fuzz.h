// fuzz.h - what the fuzz targets share. A target may throw lococo::Error, which is the library's answer to bad input;
// anything else (a crash, a sanitizer's report, another exception, a failed REQUIRE) is a finding.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "check.h"
#include "error.h"

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

// Of this process, in memory where the system has such a file system: a target reads files, as the library does.
inline const std::string& scratch() {
  static const std::string path = [] {
    const bool memory = std::filesystem::is_directory("/dev/shm");
    std::string pattern = std::string(memory ? "/dev/shm" : "/tmp") + "/lococo-fuzz-XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) std::abort();
    static const std::string made = pattern;
    std::atexit([] {
      std::error_code ignored;
      std::filesystem::remove_all(made, ignored);
    });
    return pattern;
  }();
  return path;
}

// The status and text of body(); LOCOCO_OK and "" if it throws nothing.
struct Outcome {
  lococo_status status = LOCOCO_OK;
  std::string text;
};

template <typename F>
Outcome outcome_of(F&& body) {
  try {
    body();
    return {};
  } catch (const lococo::Error& e) {
    REQUIRE(e.status() != LOCOCO_OK && e.status() != LOCOCO_ERROR_INTERNAL && e.what()[0] != '\0');
    return {e.status(), e.what()};
  }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
