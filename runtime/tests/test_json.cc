#include <limits>

#include "check.h"
#include "json.h"

using lococo::json::parse;
using lococo::json::Value;

namespace {

std::string canonical(const std::string& text) {
  std::string out;
  write_canonical(parse(text), out);
  return out;
}

void accepts() {
  const Value v = parse(R"( {"a": [1, -2, 9223372036854775807, -9223372036854775808], "b": {"c": true, "d": null},
    "e": 1.5e-3, "f": "x\u00e9\ud83d\ude00\n\"\\\/é😀", "g": [], "h": {}, "i": false} )");
  CHECK_EQ(v.at("a").as_array().size(), 4u);
  CHECK_EQ(v.at("a").items[2].as_int(0, std::numeric_limits<int64_t>::max()), std::numeric_limits<int64_t>::max());
  CHECK_EQ(v.at("a").items[3].integer, std::numeric_limits<int64_t>::min());
  CHECK(v.at("b").at("c").as_bool());
  CHECK(v.at("b").at("d").is_null());
  CHECK_EQ(v.at("e").as_real(), 1.5e-3);
  CHECK_EQ(v.at("a").items[1].as_real(), -2.0);
  CHECK_EQ(v.at("f").as_string(), "x\xc3\xa9\xf0\x9f\x98\x80\n\"\\/\xc3\xa9\xf0\x9f\x98\x80");
  CHECK(v.find("z") == nullptr);
  CHECK_EQ(v.at("g").line, 2);
  CHECK_EQ(parse("0").integer, 0);
  CHECK_EQ(parse("-0").integer, 0);
}

void refuses() {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[",
                           "[1",
                           "[1,",
                           "[1,]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{a:1}",
                           "tru",
                           "truex",
                           "nul",
                           "01",
                           "1.",
                           ".5",
                           "-",
                           "1e",
                           "+1",
                           "1 2",
                           "\"",
                           "\"\\",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\ud800\"",
                           "\"\\ud800\\u0041\"",
                           "\"\\udc00\"",
                           "\"\t\"",
                           "'a'",
                           "[1 2]",
                           "NaN",
                           "Infinity",
                           "{\"a\":1,\"a\":2}",
                           "9223372036854775808",
                           "-9223372036854775809",
                           "// comment\n1",
                           "\xef\xbb\xbf{}"}) {
    CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("not valid JSON", "line 1"), parse(text));
  }
  // not UTF-8: a lone continuation, a long form, a surrogate, beyond U+10FFFF, a sequence cut short
  for (const char* text : {"\"\x80\"", "\"\xc0\xaf\"", "\"\xe0\x80\xaf\"", "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"",
                           "\"\xf5\x80\x80\x80\"", "\"\xc3\"", "\"\xe2\x82\"", "\"\xf0\x9f\x98"}) {
    CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("not UTF-8"), parse(text));
  }
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("line 1, column 4"), parse(std::string("[1,\0]", 5)));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("line 2, column 3"), parse("[\n1 2]"));
}

void bounds_hostile_input() {
  CHECK_EQ(parse(std::string(60, '[') + std::string(60, ']')).items.size(), 1u);
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("nested"), parse(std::string(1'000'000, '[')));
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("nested"), parse(objects));
  std::string many = "[0";
  for (int i = 0; i < 2'000'000; ++i) many += ",0";
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("more than 1048576 values"), parse(many + "]"));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("at most 16777216 bytes"), parse(std::string(17 << 20, ' ')));
}

void names_wrong_types() {
  const Value v = parse("{\n\"n\": 5,\n\"s\": \"text\"}");
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("line 3", "an integer from 0 to 9", "a string, text"),
              (void)v.at("s").as_int(0, 9));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("line 2", "from 6 to 9", "5"), (void)v.at("n").as_int(6, 9));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("line 2", "an array"), (void)v.at("n").as_array());
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("an object"), (void)v.at("n").at("x"));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("\"missing\""), (void)v.at("missing"));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("true or false"), (void)v.at("n").as_bool());
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("a number"), (void)v.at("s").as_real());
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("a string"), (void)v.at("n").as_string());
}

void writes_what_python_writes() {
  CHECK_EQ(canonical(R"({"b": [1, 2.50, 1e-05], "a": {"z": null, "y": true}, "": false})"),
           R"({"":false,"a":{"y":true,"z":null},"b":[1,2.50,1e-05]})");
  CHECK_EQ(canonical("\"\\u0001\\b\\f\\n\\r\\t\\\"\\\\/\x7f\xc3\xa9\xf0\x9f\x98\x80\""),
           "\"\\u0001\\b\\f\\n\\r\\t\\\"\\\\/\\u007f\\u00e9\\ud83d\\ude00\"");
}

}  // namespace

int main() {
  accepts();
  refuses();
  bounds_hostile_input();
  names_wrong_types();
  writes_what_python_writes();
  return finish();
}
