// replay.cc - runs a fuzz target without libFuzzer: every file given (or in the folders given), and of each as many
// seeded mutations as --mutations says. The same command does the same.
#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "fuzz.h"

namespace {

using Random = std::mt19937_64;

size_t below(Random& random, size_t n) { return random() % n; }

// One to four small damages: a bit, a byte, a number, a piece removed, repeated or taken from another input.
void mutate(std::string& text, const std::string& other, Random& random) {
  static constexpr const char* kPieces[] = {"0",     "-1",      "9223372036854775807",
                                            "1e999", "null",    "[]",
                                            "{}",    "\"\"",    "[[",
                                            "\"",    "\\u0000", "true",
                                            ",",     ":",       "../x",
                                            "\xff"};
  for (size_t i = 0; i <= below(random, 4); ++i) {
    if (text.empty()) text = other;
    if (text.empty()) return;
    const size_t at = below(random, text.size());
    const size_t length = below(random, std::min<size_t>(text.size() - at, 64)) + 1;
    switch (below(random, 7)) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ (1 << below(random, 8)));
        break;
      case 1:
        text[at] = static_cast<char>(random());
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(at, length));
        break;
      case 4:
        text.replace(at, std::min<size_t>(length, 8), kPieces[below(random, std::size(kPieces))]);
        break;
      case 5:
        text.resize(at);
        break;
      default:
        if (!other.empty()) text.replace(at, length, other.substr(below(random, other.size()), length));
    }
  }
}

void run(const std::string& input) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int argc, char** argv) {
  constexpr const char* kOption = "--mutations=";
  size_t mutations = 0;
  std::vector<std::string> inputs;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], kOption, std::strlen(kOption)) == 0) {
      mutations = std::strtoul(argv[i] + std::strlen(kOption), nullptr, 10);
    } else if (std::filesystem::is_directory(argv[i])) {
      std::vector<std::string> paths;
      for (const auto& entry : std::filesystem::directory_iterator(argv[i])) paths.push_back(entry.path().string());
      std::sort(paths.begin(), paths.end());
      for (const std::string& path : paths) inputs.push_back(read_text(path));
    } else {
      inputs.push_back(read_text(argv[i]));
    }
  }
  if (inputs.empty()) {
    std::fprintf(stderr, "usage: %s [--mutations=N] FILE-OR-FOLDER...\n", argv[0]);
    return 2;
  }
  Random random(1);
  for (const std::string& input : inputs) run(input);
  for (size_t i = 0; i < mutations; ++i) {
    std::string text = inputs[i % inputs.size()];
    mutate(text, inputs[below(random, inputs.size())], random);
    run(text);
  }
  std::printf("%zu inputs, %zu mutations\n", inputs.size(), mutations);
  return 0;
}
