// json.h - a strict JSON reader (RFC 8259) for untrusted input: bounded depth, size and number of values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lococo::json {

struct Member;

// One parsed value. Accessors throw Error(LOCOCO_ERROR_CORRUPT) that gives the line of a value of the wrong type.
class Value {
 public:
  enum class Type { kNull, kBool, kInteger, kReal, kString, kArray, kObject };

  Type type = Type::kNull;
  bool boolean = false;
  int64_t integer = 0;
  std::string text;             // a string's UTF-8 bytes; a number as it was written
  std::vector<Value> items;     // of an array
  std::vector<Member> members;  // of an object, sorted by key
  int line = 0;                 // where it starts, for messages

  [[nodiscard]] bool is_null() const { return type == Type::kNull; }
  [[nodiscard]] bool as_bool() const;
  [[nodiscard]] int64_t as_int(int64_t lowest, int64_t highest) const;
  [[nodiscard]] double as_real() const;  // an integer counts as a real number
  [[nodiscard]] const std::string& as_string() const;
  [[nodiscard]] const std::vector<Value>& as_array() const;
  [[nodiscard]] const Value& at(std::string_view key) const;    // member of an object, which must be there
  [[nodiscard]] const Value* find(std::string_view key) const;  // nullptr if it is not

 private:
  [[noreturn]] void fail_type(const char* expected) const;
};

struct Member {
  std::string key;
  Value value;
};

// Throws Error(LOCOCO_ERROR_CORRUPT) with line and column.
Value parse(std::string_view text);

// Sorted keys, no spaces, ASCII only, numbers as written: the bytes of Python's
// json.dumps(value, sort_keys=True, separators=(",", ":")).
void write_canonical(const Value& value, std::string& out);

}  // namespace lococo::json
