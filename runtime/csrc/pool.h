// pool.h - many sessions of one model under a memory budget: the least recently used ones wait on disk, as state files.
//
// The mutex guards who owns what, never a read, a write or a forward: a thread that takes an entry out of kDisk or
// kMemory owns it alone until it puts it back.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "files.h"
#include "lococo.h"
#include "session.h"

namespace lococo {

// The name of a parked session's file: the id, with every byte but a-z, 0-9, "-", "_" and inner dots as %XX, so that
// it is safe on any file system, also where case does not count. INVALID_ARGUMENT: empty, or too long for a file name.
std::string parked_file_name(const std::string& id);
// The id of such a file; false if it is none.
bool parse_parked_file_name(const std::string& name, std::string& id);

class Pool {
 public:
  // max_sessions: in memory at once, at least 1. What is parked in the directory already belongs to the pool.
  Pool(std::shared_ptr<Model> model, const std::string& directory, uint64_t max_sessions);

  // All as the C interface says.
  Session& acquire(const std::string& id, const char* start, int32_t timeout_ms);
  void release(Session& session);
  void flush(const std::string& id);
  void flush_all();
  void remove(const std::string& id);
  [[nodiscard]] lococo_place place(const std::string& id) const;
  [[nodiscard]] std::vector<std::pair<std::string, lococo_place>> list() const;
  [[nodiscard]] lococo_pool_info info() const;

 private:
  enum class Place {
    kDisk,    // a state file, nothing in memory
    kMemory,  // idle
    kBusy,    // as one of these two, but a thread writes or removes its file and is back soon
    kHeld,    // acquired, or about to be
  };
  struct Entry {
    Place place = Place::kDisk;
    bool on_disk = false;  // has a state file, which may be older than the session
    bool dirty = false;    // the session is newer than its state file
    uint64_t last_used = 0;
    std::unique_ptr<Session> session;  // null on disk
  };
  using Entries = std::unordered_map<std::string, Entry>;  // by id; its nodes do not move
  using Node = Entries::value_type;
  using Lock = std::unique_lock<std::mutex>;
  struct Patience {
    bool endless;
    std::chrono::steady_clock::time_point end;
  };

  [[noreturn]] void fail_unknown(const std::string& id) const;
  static lococo_place place_of(const Entry& entry);
  [[nodiscard]] std::string path(const std::string& id) const { return directory_ + "/" + parked_file_name(id); }
  void scan();
  Node* find(Lock& lock, const std::string& id);
  Node& find_idle(Lock& lock, const std::string& id);
  bool wait(Lock& lock, const Patience& patience);
  std::unique_ptr<Session> take_session(Lock& lock, const Patience& patience);
  template <typename F>
  void work_on(Lock& lock, Node& node, F&& work);
  void write(Lock& lock, Node& node);
  void drop_session(Node& node);

  const std::shared_ptr<Model> model_;
  const uint64_t max_sessions_;
  const std::string directory_;
  const DirectoryLock directory_lock_;

  mutable std::mutex mutex_;  // of all below
  std::condition_variable changed_;
  Entries entries_;
  std::map<uint64_t, Node*> idle_;                  // kMemory, by last_used
  std::set<const Node*> busy_;                      // kBusy
  std::unordered_map<const Session*, Node*> held_;  // kHeld, once they have a session
  std::vector<std::unique_ptr<Session>> spare_;     // of nobody, to be used again
  uint64_t num_in_memory_ = 0;                      // sessions anywhere in memory
  int64_t num_held_ = 0;
  uint64_t clock_ = 0;
  int64_t parks_ = 0;
  int64_t resumes_ = 0;
};

}  // namespace lococo
