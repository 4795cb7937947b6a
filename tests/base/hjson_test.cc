// SPDX-License-Identifier: Apache-2.0
//
// What DeepSpeed's loader of Hjson takes, we take with the same values; what is wrong names its
// place. The accepted texts and their values were compared with hjson 3.1 for Python.
#include "base/hjson.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace zerod {
namespace {

using ::testing::HasSubstr;

std::vector<std::string> Lines(const ConfigProblems& problems) {
  return absl::StrSplit(std::string(problems.ToStatus().message()), '\n');
}

const struct {
  const char* text;
  const char* json;
} kAccepted[] = {
    {"{}", "{}"},
    {" {\n}\n ", "{}"},
    {"\xef\xbb\xbf{}", "{}"},
    {"[]", "[]"},
    {"null", "null"},
    {"3", "3"},
    {R"({"a": 1, "b": [1, 2.5, -3e2, true, false, null, "x"]})",
     R"({"a":1,"b":[1,2.5,-300.0,true,false,null,"x"]})"},
    {"{\"a\": 1,}", R"({"a":1})"},
    {"{\"a\": [1, 2,],}", R"({"a":[1,2]})"},
    {"{a: 1, b_c-d.e: 2}", R"({"a":1,"b_c-d.e":2})"},
    {"{'a': 'x\"y', \"b\": \"it's\"}", R"({"a":"x\"y","b":"it's"})"},
    {"// one\n{ # two\n \"a\": 1, /* three\n */ \"b\": 2 // four\n}", R"({"a":1,"b":2})"},
    {"{\n  a: 1\n  b: 2\n}", R"({"a":1,"b":2})"},
    {"a: 1\nb: {c: 2}\n", R"({"a":1,"b":{"c":2}})"},
    {"# head\na: x\n", R"({"a":"x"})"},
    {"{a: text to the end, of the line\n b: 2}", R"({"a":"text to the end, of the line","b":2})"},
    {"{a: true # why\n}", R"({"a":true})"},
    {"{a: truely\n}", R"({"a":"truely"})"},
    {"{a: 1 2\n}", R"({"a":"1 2"})"},
    {"{a: 01\n}", R"({"a":"01"})"},
    {"{a: +1\n}", R"({"a":"+1"})"},
    {"{a: 1.\n}", R"({"a":"1."})"},
    {"{a: .5\n}", R"({"a":".5"})"},
    {"{a: 1e\n}", R"({"a":"1e"})"},
    {"{a: -1 ,b: 2e8}", R"({"a":-1,"b":200000000.0})"},
    {"{a: 18446744073709551615, b: -9223372036854775808}",
     R"({"a":18446744073709551615,"b":-9223372036854775808})"},
    {"{a: 18446744073709551616}", R"({"a":1.8446744073709552e+19})"},
    {"{a: 1e-999}", R"({"a":0.0})"},
    {R"({"a": "\u00e9\ud83d\ude00\n\t\"\\\/"})", "{\"a\":\"é😀\\n\\t\\\"\\\\/\"}"},
    {"{\"é\": \"ü\"}", "{\"é\":\"ü\"}"},
    {"{a: '''one'''\n}", R"({"a":"one"})"},
    {"{\n  a:\n    '''\n    one\n      two\n    '''\n}", R"({"a":"one\n  two"})"},
    {"{a: C:\\temp\n}", R"({"a":"C:\\temp"})"},
    {"{a: [\n  1\n  2\n]}", R"({"a":[1,2]})"},
    {"{\r\n a: x\r\n b: 1\r\n}\r\n", R"({"a":"x","b":1})"},
};

TEST(HjsonTest, Accepted) {
  for (const auto& c : kAccepted) {
    ConfigProblems problems;
    const Json document = ParseHjson(c.text, &problems);
    EXPECT_TRUE(problems.empty()) << c.text << "\n" << problems.ToStatus();
    EXPECT_EQ(document.dump(), c.json) << c.text;
  }
}

TEST(HjsonTest, NumbersAsPythonWritesThem) {
  ConfigProblems problems;
  const Json list = ParseHjson(R"({"a": [NaN, Infinity, -Infinity], "b": 1})", &problems);
  ASSERT_TRUE(problems.empty()) << problems.ToStatus();
  EXPECT_TRUE(std::isnan(list["a"][0].get<double>()));
  EXPECT_EQ(list["a"][1], std::numeric_limits<double>::infinity());
  EXPECT_EQ(list["a"][2], -std::numeric_limits<double>::infinity());
  EXPECT_EQ(list["b"], 1);
}

TEST(HjsonTest, ErrorsNameThePlace) {
  const struct {
    std::string text;
    const char* says;
  } cases[] = {
      {"", "is empty"},
      {" \n ", "is empty"},
      {"# nothing but this\n", "line 2, column 1: the text ends where a value should be"},
      {"{\"a\": 8", "line 1, column 8: the text ends within an object"},
      {"{\"a\" 8}", "line 1, column 6: a \":\" is missing after the key"},
      {"{\"a\": 8}\nx", "line 2, column 1: there is something after the configuration's end"},
      {"{\"a\": }", "line 1, column 7: a value is missing"},
      {"{\"a\":", "line 1, column 6: the text ends where a value should be"},
      {"{,}", "line 1, column 2: a key is missing"},
      {"{\"a\": 1,, \"b\": 2}", "line 1, column 9: a key is missing"},
      {"{a b: 1}", "line 1, column 4: a \":\" is missing"},
      {"{\"a\": \"x\ny\"}", "line 1, column 9: a line end or another control character"},
      {"{\"a\": \"x", "line 1, column 9: the text ends within a string"},
      {"{\"a\": '''x", "ends within a string of several lines"},
      {"{\"a\": \"\\x41\"}", "an escape that JSON does not have"},
      {"{\"a\": \"\\u12g4\"}", "an escape that JSON does not have"},
      {"{\"a\": \"\\ud800\"}", "half of a surrogate pair"},
      {"{\"a\": \"\\udc00\"}", "half of a surrogate pair"},
      {"{\"a\": \"\\ud800\\u0041\"}", "half of a surrogate pair"},
      {"{ /* \"a\": 1}", "a comment that is not closed"},
      {"{\"a\": 1e999}", "the number 1e999 is too large"},
      {"{\"a\": [1, 2}", "line 1, column 12: a value is missing"},
      // The likely slip: nothing in quotes, all in one line.
      {"{optimizer: {type: AdamW, params: {lr: 1}}}",
       "the text ends within an object (text without quotes runs to the end of its line; is that "
       "meant at line 1, column 20?)"},
      {"{\"\xff\": 1}", "is not UTF-8 text"},
      {std::string("{\0}", 3), "line 1, column 3: a \":\" is missing"},
      {std::string(100000, '['), "nested more than 32 levels"},
      {"{\"a\":" + std::string(100000, '['), "nested more than 32 levels"},
      {std::string(2 << 20, ' '), "has 2097152 bytes; at most 1048576 are allowed"},
  };
  for (const auto& c : cases) {
    ConfigProblems problems;
    const Json document = ParseHjson(c.text, &problems);
    const std::string shown = c.text.substr(0, 80);
    const std::vector<std::string> lines = Lines(problems);
    EXPECT_TRUE(document.is_null()) << shown;
    ASSERT_EQ(lines.size(), 1u) << shown << "\n" << testing::PrintToString(lines);
    EXPECT_THAT(lines[0], HasSubstr(c.says)) << shown;
  }
}

TEST(HjsonTest, KeysGivenTwiceAreProblemsBesideTheDocument) {
  ConfigProblems problems;
  const Json document = ParseHjson("{a: {b: 1, b: 2}, c: [{d: 1, 'd': 2}], a: 3}", &problems);
  EXPECT_TRUE(document.is_object());
  EXPECT_THAT(Lines(problems),
              testing::ElementsAre("a.b: is given more than once; keep one",
                                   "c.d: is given more than once; keep one",
                                   "a: is given more than once; keep one"));
}

// Texts that would take hours if something were looked at again and again.
TEST(HjsonTest, LongTextsTakeTimeInProportion) {
  const size_t bytes = 1 << 19;
  std::string digits = "{a: " + std::string(bytes / 2, '1') + " x" + std::string(bytes / 2, ',');
  std::string lines = "{";
  while (lines.size() < bytes) absl::StrAppend(&lines, "k", lines.size(), ": a,b\n");
  for (const std::string& text : {digits, lines, std::string(bytes, '\n') + "{", digits + "\n}"}) {
    ConfigProblems problems;
    (void)ParseHjson(text, &problems);
  }
}

}  // namespace
}  // namespace zerod
