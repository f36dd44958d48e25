// two_sessions.cc - two_sessions.c in C++: ./two_sessions bundle/ NUM_TOKENS ID ID
#include <future>
#include <iostream>
#include <string>
#include <vector>

#include "device.h"
#include "lococo.hpp"

namespace {

std::vector<int32_t> generate(const lococo::Model& model, int32_t prompt, int32_t num_tokens) {
  const lococo::Session session = lococo::create_session(model);  // of this thread
  lococo::check(lococo_session_step(session.get(), prompt));
  std::vector<int32_t> ids;
  const lococo_token_fn keep_token = [](int32_t token_id, void* user) {
    static_cast<std::vector<int32_t>*>(user)->push_back(token_id);
    return 0;  // go on
  };
  lococo::check(lococo_session_generate(session.get(), nullptr, num_tokens, keep_token, &ids, nullptr));
  return ids;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " BUNDLE NUM_TOKENS ID ID\n";
    return 2;
  }
  const lococo_options options = chosen_device();
  const lococo::Model model = lococo::open_model(argv[1], &options);
  std::vector<std::future<std::vector<int32_t>>> results;
  for (const int i : {3, 4}) {
    results.push_back(
        std::async(std::launch::async, [&, i] { return generate(model, std::stoi(argv[i]), std::stoi(argv[2])); }));
  }
  for (auto& result : results) {
    std::cout << "tokens";
    for (const int32_t id : result.get()) std::cout << " " << id;  // rethrows what the thread threw
    std::cout << "\n";
  }
  return 0;
} catch (const std::exception& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
