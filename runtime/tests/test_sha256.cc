#include "check.h"
#include "sha256.h"

using lococo::Digest;
using lococo::Sha256;

namespace {

std::string hash(const std::string& text, Sha256::Path path, size_t piece) {
  Sha256 sha(path);
  for (size_t at = 0; at < text.size(); at += piece) sha.update(text.data() + at, std::min(piece, text.size() - at));
  return lococo::to_hex(sha.digest());
}

}  // namespace

int main() {
  std::printf("hardware path: %s\n", Sha256::best_path() == Sha256::Path::kHardware ? "yes" : "not on this CPU (SKIP)");
  const std::pair<std::string, const char*> known[] = {
      // FIPS 180-4 examples and the NIST test vectors
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrst"
       "u",
       "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
      {std::string(1'000'000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"}};
  for (const auto& [text, expected] : known) {
    for (const Sha256::Path path : {Sha256::Path::kPortable, Sha256::best_path()}) {
      for (const size_t piece : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{1} << 20}) {
        if (text.size() > 1000 && piece == 1) continue;
        CHECK_EQ(hash(text, path, piece), expected);
      }
    }
  }
  for (size_t n = 0; n <= 200; ++n) {  // every way the padding can fall
    std::string text(n, '\0');
    for (size_t i = 0; i < n; ++i) text[i] = static_cast<char>(i * 37);
    CHECK_EQ(hash(text, Sha256::best_path(), 7), hash(text, Sha256::Path::kPortable, 200));
  }
  Digest digest;
  CHECK(lococo::from_hex(known[1].second, digest));
  CHECK_EQ(lococo::to_hex(digest), known[1].second);
  CHECK(!lococo::from_hex("ba78", digest));
  CHECK(!lococo::from_hex(std::string(64, 'A'), digest));
  CHECK(!lococo::from_hex(std::string(63, '0') + "g", digest));
  return finish();
}
