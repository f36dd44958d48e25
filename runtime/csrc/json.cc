#include "json.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "error.h"

namespace lococo::json {
namespace {

constexpr int kMaxDepth = 64;            // the manifest needs about 8
constexpr size_t kMaxBytes = 16u << 20;  // a manifest of a 70B model has under 2 MB
constexpr int kMaxValues = 1 << 20;      // a value takes about 100 bytes once parsed

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {
    if (text.size() > kMaxBytes) {
      fail(LOCOCO_ERROR_CORRUPT, "expected JSON of at most %zu bytes, got %zu", kMaxBytes, text.size());
    }
  }

  Value document() {
    Value value = parse_value(0);
    skip_space();
    if (at_ < text_.size()) fail_here("expected the end of the text");
    return value;
  }

 private:
  [[noreturn]] void fail_here(const char* what) const {
    const size_t line_start = at_ == 0 ? 0 : text_.rfind('\n', at_ - 1) + 1;  // npos + 1 == 0
    fail(LOCOCO_ERROR_CORRUPT, "not valid JSON: line %d, column %zu: %s", line_, at_ - line_start + 1, what);
  }

  [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '\n') {
        ++line_;
      } else if (c != ' ' && c != '\t' && c != '\r') {
        return;
      }
    }
  }

  void expect(char c, const char* what) {
    if (peek() != c || at_ >= text_.size()) fail_here(what);
    ++at_;
  }

  Value parse_value(int depth) {
    if (depth > kMaxDepth) fail_here("nested more than 64 deep");
    if (++num_values_ > kMaxValues) fail_here("more than 1048576 values");
    skip_space();
    Value value;
    value.line = line_;
    switch (peek()) {
      case '{':
        parse_object(value, depth);
        break;
      case '[':
        parse_array(value, depth);
        break;
      case '"':
        value.type = Value::Type::kString;
        value.text = parse_string();
        break;
      case 't':
      case 'f':
        value.type = Value::Type::kBool;
        value.boolean = peek() == 't';
        parse_word(value.boolean ? "true" : "false");
        break;
      case 'n':
        parse_word("null");
        break;
      default:
        parse_number(value);
    }
    return value;
  }

  void parse_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail_here("expected a value");
    at_ += word.size();
  }

  void parse_array(Value& value, int depth) {
    value.type = Value::Type::kArray;
    ++at_;
    skip_space();
    if (peek() == ']') {
      ++at_;
      return;
    }
    while (true) {
      value.items.push_back(parse_value(depth + 1));
      skip_space();
      if (peek() == ']') {
        ++at_;
        return;
      }
      expect(',', "expected ',' or ']'");
    }
  }

  void parse_object(Value& value, int depth) {
    value.type = Value::Type::kObject;
    ++at_;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    while (true) {
      skip_space();
      if (peek() != '"') fail_here("expected a string as key");
      Member member;
      member.key = parse_string();
      skip_space();
      expect(':', "expected ':'");
      member.value = parse_value(depth + 1);
      value.members.push_back(std::move(member));
      skip_space();
      if (peek() == '}') break;
      expect(',', "expected ',' or '}'");
    }
    ++at_;
    auto& members = value.members;
    std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.key < b.key; });
    const auto twin = std::adjacent_find(members.begin(), members.end(),
                                         [](const Member& a, const Member& b) { return a.key == b.key; });
    if (twin != members.end()) fail_here("this object has a key twice");
  }

  void digits() {
    const size_t start = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    if (at_ == start) fail_here("expected a value");
  }

  void parse_number(Value& value) {
    const size_t start = at_;
    if (peek() == '-') ++at_;
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    value.type = Value::Type::kInteger;
    if (peek() == '.') {
      ++at_;
      digits();
      value.type = Value::Type::kReal;
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
      value.type = Value::Type::kReal;
    }
    value.text = text_.substr(start, at_ - start);
    if (value.type == Value::Type::kInteger) {
      errno = 0;
      value.integer = std::strtoll(value.text.c_str(), nullptr, 10);
      if (errno == ERANGE) fail_here("an integer beyond 64 bits");
    }
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      unsigned digit = 0;
      if (c >= '0' && c <= '9') {
        digit = static_cast<unsigned>(c - '0');
      } else if (c >= 'a' && c <= 'f') {
        digit = static_cast<unsigned>(c - 'a' + 10);
      } else if (c >= 'A' && c <= 'F') {
        digit = static_cast<unsigned>(c - 'A' + 10);
      } else {
        fail_here("expected four hex digits after \\u");
      }
      code = code * 16 + digit;
    }
    return code;
  }

  void append_utf8(std::string& out, unsigned code) {
    const auto put = [&out](unsigned byte) { out.push_back(static_cast<char>(byte)); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | code >> 6);
      put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12);
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
      put(0x80 | (code >> 6 & 0x3F));
      put(0x80 | (code & 0x3F));
    }
  }

  void parse_escape(std::string& out) {
    ++at_;  // the backslash
    const char c = peek();
    static constexpr std::string_view kFrom = "\"\\/bfnrt";
    static constexpr std::string_view kTo = "\"\\/\b\f\n\r\t";
    if (const size_t i = kFrom.find(c); i != std::string_view::npos) {
      out.push_back(kTo[i]);
      ++at_;
      return;
    }
    if (c != 'u') fail_here("unknown escape");
    ++at_;
    unsigned code = hex4();
    if (code >= 0xDC00 && code < 0xE000) fail_here("a low surrogate without its high one");
    if (code >= 0xD800 && code < 0xDC00) {
      if (text_.substr(at_, 2) != "\\u") fail_here("a high surrogate without its low one");
      at_ += 2;
      const unsigned low = hex4();
      if (low < 0xDC00 || low >= 0xE000) fail_here("a high surrogate without its low one");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
  }

  // The bytes of one UTF-8 sequence at at_: shortest form only, no surrogates, at most U+10FFFF.
  void copy_utf8(std::string& out) {
    const auto byte = [this](size_t i) {
      return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0u;
    };
    const unsigned lead = byte(0);
    size_t length = 0;
    unsigned lowest = 0x80;  // bounds of the second byte, which rule out long forms and surrogates
    unsigned highest = 0xBF;
    if (lead < 0x80) {
      length = 1;
    } else if (lead >= 0xC2 && lead <= 0xDF) {
      length = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
      length = 3;
      if (lead == 0xE0) lowest = 0xA0;
      if (lead == 0xED) highest = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
      length = 4;
      if (lead == 0xF0) lowest = 0x90;
      if (lead == 0xF4) highest = 0x8F;
    } else {
      fail_here("not UTF-8");
    }
    if (length > 1 && (byte(1) < lowest || byte(1) > highest)) fail_here("not UTF-8");
    for (size_t i = 2; i < length; ++i) {
      if ((byte(i) & 0xC0) != 0x80) fail_here("not UTF-8");
    }
    out.append(text_.substr(at_, length));
    at_ += length;
  }

  std::string parse_string() {
    ++at_;  // the opening quote
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail_here("a string without its closing quote");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (c == '\\') {
        parse_escape(out);
      } else if (static_cast<unsigned char>(c) < 0x20) {
        fail_here("a control character inside a string");
      } else {
        copy_utf8(out);
      }
    }
  }

  std::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
  int num_values_ = 0;
};

// Precondition: text is valid UTF-8, as parse() guarantees.
void write_string(const std::string& text, std::string& out) {
  const auto escape = [&out](unsigned unit) { out += format("\\u%04x", unit); };
  out.push_back('"');
  for (size_t i = 0; i < text.size();) {
    const unsigned lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    unsigned code = length == 1 ? lead : lead & (0xFFu >> (length + 1));
    for (size_t k = 1; k < length; ++k) code = code << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3Fu);
    i += length;
    static constexpr std::string_view kFrom = "\"\\\b\f\n\r\t";
    static constexpr std::string_view kTo = "\"\\bfnrt";
    const size_t special = length == 1 ? kFrom.find(static_cast<char>(code)) : std::string_view::npos;
    if (special != std::string_view::npos) {
      out.push_back('\\');
      out.push_back(kTo[special]);
    } else if (code >= 0x20 && code < 0x7F) {
      out.push_back(static_cast<char>(code));
    } else if (code < 0x10000) {
      escape(code);
    } else {
      escape(0xD800 + ((code - 0x10000) >> 10));
      escape(0xDC00 + ((code - 0x10000) & 0x3FF));
    }
  }
  out.push_back('"');
}

}  // namespace

void Value::fail_type(const char* expected) const {
  static constexpr const char* kNames[] = {"null",     "true or false", "an integer", "a real number",
                                           "a string", "an array",      "an object"};
  const char* got = kNames[static_cast<int>(type)];
  if (text.empty()) fail(LOCOCO_ERROR_CORRUPT, "line %d: expected %s, got %s", line, expected, got);
  fail(LOCOCO_ERROR_CORRUPT, "line %d: expected %s, got %s, %.80s", line, expected, got, text.c_str());
}

bool Value::as_bool() const {
  if (type != Type::kBool) fail_type("true or false");
  return boolean;
}

int64_t Value::as_int(int64_t lowest, int64_t highest) const {
  if (type != Type::kInteger || integer < lowest || integer > highest) {
    fail_type(format("an integer from %lld to %lld", static_cast<long long>(lowest), static_cast<long long>(highest))
                  .c_str());
  }
  return integer;
}

double Value::as_real() const {
  if (type != Type::kReal && type != Type::kInteger) fail_type("a number");
  return std::strtod(text.c_str(), nullptr);
}

const std::string& Value::as_string() const {
  if (type != Type::kString) fail_type("a string");
  return text;
}

const std::vector<Value>& Value::as_array() const {
  if (type != Type::kArray) fail_type("an array");
  return items;
}

const Value* Value::find(std::string_view key) const {
  if (type != Type::kObject) fail_type("an object");
  const auto it = std::lower_bound(members.begin(), members.end(), key,
                                   [](const Member& m, std::string_view k) { return m.key < k; });
  return it != members.end() && it->key == key ? &it->value : nullptr;
}

const Value& Value::at(std::string_view key) const {
  const Value* value = find(key);
  if (value == nullptr) {
    fail(LOCOCO_ERROR_CORRUPT, "line %d: expected an object with the key \"%.*s\"", line, static_cast<int>(key.size()),
         key.data());
  }
  return *value;
}

Value parse(std::string_view text) { return Parser(text).document(); }

void write_canonical(const Value& value, std::string& out) {
  switch (value.type) {
    case Value::Type::kNull:
      out += "null";
      break;
    case Value::Type::kBool:
      out += value.boolean ? "true" : "false";
      break;
    case Value::Type::kInteger:
    case Value::Type::kReal:
      out += value.text;
      break;
    case Value::Type::kString:
      write_string(value.text, out);
      break;
    case Value::Type::kArray:
      out.push_back('[');
      for (size_t i = 0; i < value.items.size(); ++i) {
        if (i > 0) out.push_back(',');
        write_canonical(value.items[i], out);
      }
      out.push_back(']');
      break;
    case Value::Type::kObject:
      out.push_back('{');
      for (size_t i = 0; i < value.members.size(); ++i) {
        if (i > 0) out.push_back(',');
        write_string(value.members[i].key, out);
        out.push_back(':');
        write_canonical(value.members[i].value, out);
      }
      out.push_back('}');
  }
}

}  // namespace lococo::json
