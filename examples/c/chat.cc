// chat.cc - chat.c in C++: a line of token ids in is a turn, a line of token ids out is the reply.
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "device.h"
#include "lococo.hpp"

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: " << argv[0] << " BUNDLE MAX_TOKENS\n";
    return 2;
  }
  const lococo_options options = chosen_device();
  const lococo::Model model = lococo::open_model(argv[1], &options);
  const lococo::Session session = lococo::create_session(model);
  const int32_t max_tokens = std::stoi(argv[2]);

  std::vector<int32_t> reply;
  const lococo_token_fn print_token = [](int32_t token_id, void* user) {
    auto& so_far = *static_cast<std::vector<int32_t>*>(user);
    std::cout << (so_far.empty() ? "" : " ") << token_id << std::flush;
    so_far.push_back(token_id);
    return 0;  // go on
  };
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::vector<int32_t> turn(std::istream_iterator<int32_t>(words), {});
    if (turn.empty()) continue;
    if (!reply.empty()) lococo::check(lococo_session_step(session.get(), reply.back()));  // chosen, but not read yet
    lococo::check(lococo_session_prefill(session.get(), turn.data(), turn.size(), nullptr));
    reply.clear();
    lococo::check(lococo_session_generate(session.get(), nullptr, max_tokens, print_token, &reply, nullptr));
    std::cout << std::endl;
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
