// stops.h - the end of a text at the first of some strings, whatever pieces the text comes in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lococo {

class Stops {
 public:
  // strings: (n). INVALID_ARGUMENT: too many, too long, empty.
  Stops(const char* const* strings, size_t n);

  struct Shown {
    const char* text;  // until the next call
    size_t size;
    int32_t matched;  // index of the stop string that ended the text, or -1
  };
  // INVALID_ARGUMENT after a match.
  Shown push(const char* text, size_t size);
  Shown finish();
  void reset();

 private:
  void reset_matches();

  struct Stop {
    std::string text;
    std::vector<size_t> borders;  // (text.size()): longest proper prefix of text[0..i] that is its suffix
    size_t matched = 0;           // bytes of text that the end of the input equals
  };

  std::vector<Stop> stops_;
  std::string pending_;  // what was shown last, then what is held back
  size_t shown_ = 0;
  bool ended_ = false;
};

}  // namespace lococo
