#include "pool.h"

#include <algorithm>
#include <exception>
#include <filesystem>

#include "error.h"

namespace lococo {
namespace {

constexpr char kSuffix[] = ".state";
constexpr size_t kMaxEncoded = 200;  // of 255 bytes; the suffix and a staging file's own need the rest

bool is_plain(char c, bool first) {
  return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || (c == '.' && !first);
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Makes the directory if need be, and its path independent of the working directory.
std::string prepare_directory(const std::string& directory) {
  std::error_code code;
  std::string path = std::filesystem::absolute(directory, code).string();
  if (!code) std::filesystem::create_directory(path, code);
  if (code && !std::filesystem::is_directory(path)) {
    fail(code == std::errc::no_such_file_or_directory ? LOCOCO_ERROR_NOT_FOUND : LOCOCO_ERROR_IO,
         "%s: cannot make the pool's directory: %s; check the path and the permissions", directory.c_str(),
         code.message().c_str());
  }
  return path;
}

}  // namespace

std::string parked_file_name(const std::string& id) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string name;
  for (const char c : id) {
    if (is_plain(c, name.empty())) {
      name += c;
    } else {
      const auto byte = static_cast<uint8_t>(c);
      name += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  if (name.empty()) fail(LOCOCO_ERROR_INVALID_ARGUMENT, "id: expected at least one character, got none");
  if (name.size() > kMaxEncoded) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT,
         "id: expected at most %zu bytes, where each but a-z 0-9 - _ . counts as three, got %zu; use a hash of it",
         kMaxEncoded, name.size());
  }
  return name + kSuffix;
}

bool parse_parked_file_name(const std::string& name, std::string& id) {
  if (!ends_with(name, kSuffix)) return false;
  const std::string encoded = name.substr(0, name.size() - (sizeof kSuffix - 1));
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  id.clear();
  for (size_t i = 0; i < encoded.size(); ++i) {
    if (encoded[i] != '%') {
      id += encoded[i];
      continue;
    }
    const int high = i + 2 < encoded.size() ? digit(encoded[i + 1]) : -1;
    const int low = i + 2 < encoded.size() ? digit(encoded[i + 2]) : -1;
    if (high < 0 || low < 0) return false;
    id += static_cast<char>(high << 4 | low);
    i += 2;
  }
  // one file for an id, and no id that C strings cannot hold
  return !id.empty() && encoded.size() <= kMaxEncoded && id.find('\0') == std::string::npos &&
         parked_file_name(id) == name;
}

Pool::Pool(std::shared_ptr<Model> model, const std::string& directory, uint64_t max_sessions)
    : model_(std::move(model)),
      max_sessions_(max_sessions),
      directory_(prepare_directory(directory)),
      directory_lock_(directory_) {
  scan();
}

// What an earlier pool left: parked sessions, the least recently written first, and files it did not finish.
void Pool::scan() {
  std::vector<std::pair<std::filesystem::file_time_type, std::string>> found;
  std::error_code code;
  std::filesystem::directory_iterator it(directory_, code);
  for (; !code && it != std::filesystem::directory_iterator(); it.increment(code)) {
    const std::string name = it->path().filename().string();
    std::string id;
    if (parse_parked_file_name(name, id) && it->is_regular_file(code)) {
      found.emplace_back(it->last_write_time(code), std::move(id));
    } else if (ends_with(name, ".tmp") && name.find(std::string(kSuffix) + ".") != std::string::npos) {
      std::filesystem::remove(it->path(), code);
    }
    if (code) break;
  }
  if (code) fail(LOCOCO_ERROR_IO, "%s: cannot list the directory: %s", directory_.c_str(), code.message().c_str());
  std::sort(found.begin(), found.end());
  for (auto& [time, id] : found) {
    Entry& entry = entries_[std::move(id)];
    entry.on_disk = true;
    entry.last_used = ++clock_;
  }
}

// False once the patience is at its end; true after something may have changed.
bool Pool::wait(Lock& lock, const Patience& patience) {
  if (patience.endless) {
    changed_.wait(lock);
    return true;
  }
  if (std::chrono::steady_clock::now() >= patience.end) return false;
  changed_.wait_until(lock, patience.end);
  return true;
}

// The id's entry, not kBusy; NULL if there is none.
Pool::Node* Pool::find(Lock& lock, const std::string& id) {
  for (;;) {
    const auto it = entries_.find(id);
    if (it == entries_.end()) return nullptr;
    if (it->second.place != Place::kBusy) return &*it;
    changed_.wait(lock);
  }
}

void Pool::fail_unknown(const std::string& id) const {
  fail(LOCOCO_ERROR_NOT_FOUND, "session \"%s\": not in the pool at %s; check the id", id.c_str(), directory_.c_str());
}

Pool::Node& Pool::find_idle(Lock& lock, const std::string& id) {
  Node* node = find(lock, id);
  if (node == nullptr) fail_unknown(id);
  if (node->second.place == Place::kHeld) {
    fail(LOCOCO_ERROR_BUSY, "session \"%s\": acquired; release it first", id.c_str());
  }
  return *node;
}

// Runs `work` on an entry of kDisk or kMemory without the lock; afterwards the entry is where it was.
template <typename F>
void Pool::work_on(Lock& lock, Node& node, F&& work) {
  Entry& entry = node.second;
  const Place before = entry.place;
  busy_.insert(&node);
  auto place_in_line = idle_.extract(entry.last_used);  // empty if on disk
  entry.place = Place::kBusy;
  lock.unlock();
  std::exception_ptr failure;
  try {
    work();
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  entry.place = before;
  idle_.insert(std::move(place_in_line));
  busy_.erase(&node);
  changed_.notify_all();
  if (failure) std::rethrow_exception(failure);
}

void Pool::write(Lock& lock, Node& node) {
  Entry& entry = node.second;
  work_on(lock, node, [&] { entry.session->save(path(node.first)); });
  entry.on_disk = true;
  entry.dirty = false;
  ++parks_;
}

// A session to be filled: a spare one, a new one if the budget allows, or that of the least recently used idle entry,
// which is parked.
std::unique_ptr<Session> Pool::take_session(Lock& lock, const Patience& patience) {
  std::exception_ptr failure;  // of parking
  for (;;) {
    if (!spare_.empty()) {
      std::unique_ptr<Session> session = std::move(spare_.back());
      spare_.pop_back();
      return session;
    }
    if (num_in_memory_ < max_sessions_) {
      spare_.reserve(num_in_memory_ + 1);  // giving one back takes no memory
      ++num_in_memory_;
      lock.unlock();
      std::unique_ptr<Session> session;
      try {
        session = std::make_unique<Session>(model_);
      } catch (...) {
        lock.lock();
        --num_in_memory_;
        changed_.notify_all();
        throw;
      }
      lock.lock();
      return session;
    }
    // Where the disk does not take one, another may be there as it is.
    const auto victim = std::find_if(idle_.begin(), idle_.end(),
                                     [&](const auto& each) { return !failure || !each.second->second.dirty; });
    if (victim != idle_.end()) {
      Node& node = *victim->second;
      if (node.second.dirty) {
        try {
          write(lock, node);
        } catch (...) {
          failure = std::current_exception();
        }
        continue;
      }
      idle_.erase(victim);
      node.second.place = Place::kDisk;
      return std::move(node.second.session);
    }
    if (failure) std::rethrow_exception(failure);
    if (!busy_.empty()) {
      changed_.wait(lock);
    } else if (!wait(lock, patience)) {
      fail(LOCOCO_ERROR_POOL_FULL,
           "pool: all %llu sessions of the budget are acquired; release one, wait longer, or raise the budget",
           static_cast<unsigned long long>(max_sessions_));
    }
  }
}

// What a held entry has in memory is void: its state file is what is left of it, or nothing.
void Pool::drop_session(Node& node) {
  Entry& entry = node.second;
  if (entry.session) {
    held_.erase(entry.session.get());
    spare_.push_back(std::move(entry.session));
  }
  --num_held_;
  if (entry.on_disk) {
    entry.place = Place::kDisk;
  } else {
    entries_.erase(entries_.find(node.first));
  }
  changed_.notify_all();
}

Session& Pool::acquire(const std::string& id, const char* start, int32_t timeout_ms) {
  const std::string parked = path(id);
  const Patience patience = {timeout_ms < 0,
                             std::chrono::steady_clock::now() + std::chrono::milliseconds(std::max(timeout_ms, 0))};
  Lock lock(mutex_);
  Node* node = find(lock, id);
  for (; node != nullptr && node->second.place == Place::kHeld; node = find(lock, id)) {
    if (!wait(lock, patience)) {
      fail(LOCOCO_ERROR_BUSY, "session \"%s\": acquired already; release it there, or wait longer", id.c_str());
    }
  }
  if (node == nullptr) node = &*entries_.try_emplace(id).first;
  Entry& entry = node->second;
  if (entry.place == Place::kMemory) {
    held_.emplace(entry.session.get(), node);
    idle_.erase(entry.last_used);
    entry.place = Place::kHeld;
    ++num_held_;
  } else {
    entry.place = Place::kHeld;
    ++num_held_;
    try {
      entry.session = take_session(lock, patience);
      held_.emplace(entry.session.get(), node);
      lock.unlock();
      if (entry.on_disk) {
        entry.session->load(parked);
      } else if (start != nullptr) {
        entry.session->load(start);
      } else {
        entry.session->reset();
      }
      lock.lock();
      resumes_ += entry.on_disk ? 1 : 0;
    } catch (...) {
      if (!lock.owns_lock()) lock.lock();
      drop_session(*node);
      throw;
    }
  }
  entry.dirty = true;  // it is handed out to be changed
  entry.last_used = ++clock_;
  entry.session->cancelled = false;  // of whom it was before
  entry.session->busy = false;
  return *entry.session;
}

void Pool::release(Session& session) {
  const Lock lock(mutex_);
  const auto it = held_.find(&session);
  if (it == held_.end()) {
    fail(LOCOCO_ERROR_INVALID_ARGUMENT, "session: expected one acquired from this pool and not released yet");
  }
  // It stays busy while it is idle: nobody may be inside a call.
  if (session.busy.exchange(true)) {
    fail(LOCOCO_ERROR_BUSY, "session \"%s\": in use by another thread; release it when that is done",
         it->second->first.c_str());
  }
  if (session.batch() != nullptr) {
    session.busy = false;
    fail(LOCOCO_ERROR_BUSY, "session \"%s\": in a batch; remove it from the batch, then release it",
         it->second->first.c_str());
  }
  Node& node = *it->second;
  if (session.dead) {
    drop_session(node);
    return;
  }
  idle_.emplace(clock_ + 1, &node);
  node.second.last_used = ++clock_;
  node.second.place = Place::kMemory;
  held_.erase(it);
  --num_held_;
  changed_.notify_all();
}

void Pool::flush(const std::string& id) {
  Lock lock(mutex_);
  Node& node = find_idle(lock, id);
  if (node.second.dirty && node.second.place == Place::kMemory) write(lock, node);
}

void Pool::flush_all() {
  Lock lock(mutex_);
  const uint64_t until = clock_;  // what is released from now on is the next flush's
  for (;;) {
    const auto it = std::find_if(idle_.begin(), idle_.upper_bound(until),
                                 [](const auto& each) { return each.second->second.dirty; });
    if (it != idle_.upper_bound(until)) {
      write(lock, *it->second);
    } else if (std::any_of(busy_.begin(), busy_.end(), [&](const Node* n) { return n->second.last_used <= until; })) {
      changed_.wait(lock);  // for another thread to write it, or to fail
    } else {
      return;
    }
  }
}

void Pool::remove(const std::string& id) {
  Lock lock(mutex_);
  Node& node = find_idle(lock, id);
  if (node.second.on_disk) {
    work_on(lock, node, [&] { remove_file(path(id)); });
  }
  if (node.second.place == Place::kMemory) {
    idle_.erase(node.second.last_used);
    spare_.push_back(std::move(node.second.session));
  }
  entries_.erase(id);
  changed_.notify_all();
}

lococo_place Pool::place_of(const Entry& entry) {
  if (entry.place == Place::kHeld) return LOCOCO_PLACE_ACQUIRED;
  return entry.session != nullptr ? LOCOCO_PLACE_MEMORY : LOCOCO_PLACE_DISK;
}

lococo_place Pool::place(const std::string& id) const {
  const Lock lock(mutex_);
  const auto it = entries_.find(id);
  if (it == entries_.end()) fail_unknown(id);
  return place_of(it->second);
}

std::vector<std::pair<std::string, lococo_place>> Pool::list() const {
  std::vector<std::pair<uint64_t, std::pair<std::string, lococo_place>>> found;
  {
    const Lock lock(mutex_);
    found.reserve(entries_.size());
    for (const auto& [id, entry] : entries_) {
      found.push_back({entry.last_used, {id, place_of(entry)}});
    }
  }
  std::sort(found.begin(), found.end());
  std::vector<std::pair<std::string, lococo_place>> result;
  result.reserve(found.size());
  for (auto& [last_used, each] : found) result.push_back(std::move(each));
  return result;
}

lococo_pool_info Pool::info() const {
  const Lock lock(mutex_);
  const auto busy_in_memory =
      std::count_if(busy_.begin(), busy_.end(), [](const Node* n) { return n->second.session != nullptr; });
  lococo_pool_info info = {};
  info.struct_size = sizeof info;
  info.max_sessions = max_sessions_;
  info.session_bytes = model_->session_bytes();
  info.memory_bytes = num_in_memory_ * info.session_bytes;
  info.num_acquired = num_held_;
  info.num_idle = static_cast<int64_t>(idle_.size()) + busy_in_memory;
  info.num_parked = static_cast<int64_t>(entries_.size()) - info.num_acquired - info.num_idle;
  info.parks = parks_;
  info.resumes = resumes_;
  return info;
}

}  // namespace lococo
