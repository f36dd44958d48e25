#include "batch.h"

#include <algorithm>
#include <exception>

#include "error.h"

namespace lococo {

Batch::Batch(std::shared_ptr<Model> model) : model_(std::move(model)) {
  if (model_->manifest.max_batch() == 1) {
    fail(LOCOCO_ERROR_UNSUPPORTED,
         "batch: the bundle has no batched graph; export it with --batch N to step N sessions at once");
  }
  executor_ = model_->backend->create_batch();
  if (is_loop()) {
    log_line(LOCOCO_LOG_WARNING, "batch: this backend has no batched graphs; each session takes a forward of its own");
  }
  rows_.resize(static_cast<size_t>(model_->manifest.max_batch()));
  steps_.reserve(rows_.size());
}

void Batch::check_member(const Session& session) const {
  if (session.batch() != this) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "session: expected one of this batch, got one that is in %s",
         session.batch() == nullptr ? "none; add it first" : "another");
  }
}

void Batch::add(Session& session) {
  if (session.model() != model_) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "session: expected one of the batch's model, got one of another model");
  }
  if (session.batch() != nullptr) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "session: expected one that is in no batch, got one that is in %s",
         session.batch() == this ? "this one" : "another; remove it there first");
  }
  const auto free = std::find(rows_.begin(), rows_.end(), nullptr);
  if (free == rows_.end()) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "batch: all %zu rows are taken; remove a session first", rows_.size());
  }
  const auto row = static_cast<int32_t>(free - rows_.begin());
  session.enter_batch(*this, row, is_loop() ? nullptr : &executor_->row(row));
  *free = &session;
}

void Batch::remove(Session& session) {
  check_member(session);
  session.leave_batch();
  rows_[static_cast<size_t>(session.row())] = nullptr;
  if (!is_loop()) executor_->row(session.row()).reset();  // a free row computes with zeros
}

void Batch::step(Session* const* sessions, const int32_t* ids, size_t n) {
  if (n == 0) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "sessions: expected at least one, got none");
  for (size_t i = 0; i < n; ++i) {
    const Session& s = *sessions[i];
    try {
      check_member(s);
      s.check_readable(&ids[i], 1);
      if (s.cancelled.load(std::memory_order_relaxed)) s.fail_cancelled();
    } catch (const Error& e) {
      fail(e.status(), "session %zu of %zu: %s; no session has read a token", i, n, e.what());
    }
  }
  is_loop() ? step_each(sessions, ids, n) : step_together(sessions, ids, n);
}

void Batch::step_together(Session* const* sessions, const int32_t* ids, size_t n) {
  steps_.clear();
  for (size_t i = 0; i < n; ++i) {
    const Session& s = *sessions[i];
    steps_.push_back({s.row(), ids[i], s.position(), s.live_slots()});
  }
  executor_->forward(steps_);
  std::exception_ptr first;
  for (size_t i = 0; i < n; ++i) {
    const Forward f = sessions[i]->next_step();
    try {
      f.fuses ? executor_->fuse(steps_[i]) : executor_->append(steps_[i]);
      sessions[i]->stepped(f, ids[i]);
    } catch (const Error&) {
      if (first == nullptr) first = std::current_exception();
    }
  }
  if (first != nullptr) std::rethrow_exception(first);
}

// All are started before the first is waited for, so that a device may run them side by side.
void Batch::step_each(Session* const* sessions, const int32_t* ids, size_t n) {
  std::exception_ptr first;
  const auto attempt = [&](auto&& f) {
    try {
      f();
    } catch (...) {  // of whatever kind: the others have begun
      if (first == nullptr) first = std::current_exception();
    }
  };
  for (size_t i = 0; i < n; ++i) attempt([&] { sessions[i]->start_step(ids[i]); });
  for (size_t i = 0; i < n; ++i) {
    if (!sessions[i]->dead) attempt([&] { sessions[i]->finish_step(ids[i]); });
  }
  if (first != nullptr) std::rethrow_exception(first);
}

}  // namespace lococo
