// memory_pack.cc - memory_pack.c in C++: a document is read once; every question goes to a clone of what was kept.
//
//   ./memory_pack bundle/ book.lococo 32 < questions    the pack is made from the first line if there is none yet
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "device.h"
#include "lococo.hpp"

namespace {

std::vector<int32_t> next_ids() {  // of a line; empty at the end
  std::string line;
  std::getline(std::cin, line);
  std::istringstream words(line);
  return {std::istream_iterator<int32_t>(words), {}};
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " BUNDLE PACK MAX_TOKENS\n";
    return 2;
  }
  const lococo_options options = chosen_device();
  const lococo::Model model = lococo::open_model(argv[1], &options);
  const lococo::Session pack = lococo::create_session(model);
  if (std::ifstream(argv[2]).good()) {
    lococo::check(lococo_session_load(pack.get(), argv[2]));
  } else {
    const std::vector<int32_t> document = next_ids();
    lococo::check(lococo_session_prefill(pack.get(), document.data(), document.size(), nullptr));
    lococo::check(lococo_session_save(pack.get(), argv[2]));
  }

  const lococo_token_fn print_token = [](int32_t token_id, void*) {
    std::cout << " " << token_id;
    return 0;  // go on
  };
  for (std::vector<int32_t> ids = next_ids(); !ids.empty(); ids = next_ids()) {
    const lococo::Session session = lococo::clone(pack);
    lococo::check(lococo_session_prefill(session.get(), ids.data(), ids.size(), nullptr));
    std::cout << "answer";
    lococo::check(lococo_session_generate(session.get(), nullptr, std::stoi(argv[3]), print_token, nullptr, nullptr));
    std::cout << "\n";
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
