// lococo.hpp - lococo.h for C++11 and later: handles that close themselves, and statuses that throw. Everything else is
// called as in C, with handle.get():
//
//   lococo::Model model = lococo::open_model("bundle");
//   lococo::Session session = lococo::create_session(model);
//   lococo::check(lococo_session_prefill(session.get(), ids.data(), ids.size(), nullptr));
//
// A session must be gone before its model: declare the model first.
#ifndef LOCOCO_HPP
#define LOCOCO_HPP

#include <memory>
#include <stdexcept>

#include "lococo.h"

namespace lococo {

/// A status that is not LOCOCO_OK, with the library's text for it.
class StatusError : public std::runtime_error {
 public:
  /// Takes the text of lococo_last_error().
  explicit StatusError(lococo_status status) : std::runtime_error(lococo_last_error()), status_(status) {}
  /// What the call returned.
  lococo_status status() const noexcept { return status_; }

 private:
  lococo_status status_;
};

/// Throws StatusError unless status is LOCOCO_OK.
inline void check(lococo_status status) {
  if (status != LOCOCO_OK) throw StatusError(status);
}

/// Closes and destroys; for the two pointers below.
struct Closer {
  void operator()(lococo_model* model) const noexcept { lococo_model_close(model); }
  void operator()(lococo_session* session) const noexcept { lococo_session_destroy(session); }
};

/// An opened bundle.
using Model = std::unique_ptr<lococo_model, Closer>;
/// One sequence.
using Session = std::unique_ptr<lococo_session, Closer>;

/// lococo_model_open, after comparing the ABI of the header with that of the library.
inline Model open_model(const char* bundle_dir, const lococo_options* options = nullptr) {
  if (lococo_abi_version() != LOCOCO_ABI_VERSION) {
    throw std::runtime_error("liblococo has another ABI than the lococo.h that this program was compiled with");
  }
  lococo_model* model = nullptr;
  check(lococo_model_open(bundle_dir, options, &model));
  return Model(model);
}

/// lococo_session_create.
inline Session create_session(const Model& model) {
  lococo_session* session = nullptr;
  check(lococo_session_create(model.get(), &session));
  return Session(session);
}

/// lococo_session_clone.
inline Session clone(const Session& session) {
  lococo_session* copy = nullptr;
  check(lococo_session_clone(session.get(), &copy));
  return Session(copy);
}

}  // namespace lococo

#endif
