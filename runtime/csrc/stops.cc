#include "stops.h"

#include <algorithm>

#include "error.h"
#include "lococo.h"

namespace lococo {
namespace {

// The failure function of Knuth, Morris and Pratt (1977).
std::vector<size_t> borders_of(const std::string& text) {
  std::vector<size_t> borders(text.size());
  for (size_t i = 1, k = 0; i < text.size(); ++i) {
    while (k > 0 && text[i] != text[k]) k = borders[k - 1];
    if (text[i] == text[k]) ++k;
    borders[i] = k;
  }
  return borders;
}

}  // namespace

Stops::Stops(const char* const* strings, size_t n) {
  if (n > LOCOCO_MAX_STOPS) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "stop: expected at most %d strings, got %zu", LOCOCO_MAX_STOPS, n);
  }
  for (size_t i = 0; i < n; ++i) {
    if (strings[i] == nullptr || *strings[i] == '\0') {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "stop[%zu]: expected some text, got %s", i,
           strings[i] == nullptr ? "NULL" : "an empty string");
    }
    Stop stop;
    stop.text = strings[i];
    if (stop.text.size() > LOCOCO_MAX_STOP_BYTES) {
      fail(LOCOCO_ERROR_INVALID_ARGUMENT, "stop[%zu]: expected at most %d bytes, got %zu", i, LOCOCO_MAX_STOP_BYTES,
           stop.text.size());
    }
    stop.borders = borders_of(stop.text);
    stops_.push_back(std::move(stop));
  }
}

Stops::Shown Stops::push(const char* text, size_t size) {
  if (ended_) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "stops: a stop string has ended the text; reset them before the next one");
  }
  pending_.erase(0, shown_);
  shown_ = 0;
  for (size_t i = 0; i < size; ++i) {
    pending_.push_back(text[i]);
    size_t longest = 0;
    int32_t complete = -1;
    for (size_t s = 0; s < stops_.size(); ++s) {
      Stop& stop = stops_[s];
      while (stop.matched > 0 && stop.text[stop.matched] != text[i]) stop.matched = stop.borders[stop.matched - 1];
      if (stop.text[stop.matched] == text[i]) ++stop.matched;
      if (stop.matched == stop.text.size() && stop.matched > longest) {
        longest = stop.matched;
        complete = static_cast<int32_t>(s);
      }
    }
    if (complete >= 0) {
      shown_ = pending_.size() - longest;
      ended_ = true;
      return {pending_.data(), shown_, complete};
    }
  }
  size_t held = 0;
  for (const Stop& stop : stops_) held = std::max(held, stop.matched);
  shown_ = pending_.size() - held;
  return {pending_.data(), shown_, -1};
}

Stops::Shown Stops::finish() {
  const bool ended = ended_;
  pending_.erase(0, shown_);
  reset_matches();
  shown_ = pending_.size();
  return {pending_.data(), ended ? 0 : shown_, -1};
}

void Stops::reset() {
  reset_matches();
  pending_.clear();
  shown_ = 0;
}

void Stops::reset_matches() {
  for (Stop& stop : stops_) stop.matched = 0;
  ended_ = false;
}

}  // namespace lococo
