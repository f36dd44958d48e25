// batch.h - sessions stepped together: one token of each in one forward, which reads the weights once for all.
//
// A session joins with its state, copied to a row of the batch, and leaves with it. Sessions in a batch stand wherever
// they stand: positions and fusions are each row's own. What a row computes depends on neither its place nor the
// others.
//
// On a backend that cannot run a batched graph the sessions keep their state, and a step starts a forward of each
// before it waits for the first: a loop, which reads the weights once for each session.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "backend.h"
#include "session.h"

namespace lococo {

// Callers hold the batch and every session that a call is about.
class Batch {
 public:
  explicit Batch(std::shared_ptr<Model> model);
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void add(Session& session);
  void remove(Session& session);
  // Reads ids[i] in sessions[i], i < n. BACKEND: a session has read its token, stands where it stood, or, in a loop, is
  // dead.
  void step(Session* const* sessions, const int32_t* ids, size_t n);

  // (max_batch): by row, NULL where it is free.
  [[nodiscard]] const std::vector<Session*>& sessions() const { return rows_; }
  [[nodiscard]] bool is_loop() const { return executor_ == nullptr; }

  std::atomic<bool> busy{false};  // a thread is inside

 private:
  void check_member(const Session& session) const;
  void step_together(Session* const* sessions, const int32_t* ids, size_t n);
  static void step_each(Session* const* sessions, const int32_t* ids, size_t n);

  std::shared_ptr<Model> model_;
  std::unique_ptr<BatchExecutor> executor_;  // NULL: a loop
  std::vector<Session*> rows_;
  std::vector<BatchExecutor::Step> steps_;  // of the call
};

}  // namespace lococo
