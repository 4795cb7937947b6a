// SPDX-License-Identifier: Apache-2.0
//
// CHECK is for our own mistakes: a broken invariant ends the process with the place and the
// values. Nothing that a client, a peer, a file or a configuration says may reach one; those are
// absl::Status. DCHECK costs nothing in release builds.
#pragma once

#include <sstream>
#include <string>

namespace zerod {

[[noreturn]] void CheckFailed(const char* file, int line, const std::string& what);

namespace internal {
// Collects what a CHECK streams, and never returns.
class CheckMessage {
 public:
  CheckMessage(const char* file, int line, const char* condition) : file_(file), line_(line) {
    out_ << condition << ' ';
  }
  [[noreturn]] ~CheckMessage() { CheckFailed(file_, line_, out_.str()); }
  std::ostream& stream() { return out_; }

 private:
  const char* file_;
  int line_;
  std::ostringstream out_;
};
struct Voidify {
  void operator&(std::ostream&) {}
};
}  // namespace internal
}  // namespace zerod

#define CHECK(condition)                      \
  (condition) ? (void)0                       \
              : ::zerod::internal::Voidify()& \
                    ::zerod::internal::CheckMessage(__FILE__, __LINE__, #condition).stream()
#define CHECK_EQ(a, b) CHECK((a) == (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_NE(a, b) CHECK((a) != (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_LE(a, b) CHECK((a) <= (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_LT(a, b) CHECK((a) < (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_GE(a, b) CHECK((a) >= (b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK_GT(a, b) CHECK((a) > (b)) << "(" << (a) << " vs " << (b) << ") "

#ifdef NDEBUG
#define DCHECK(condition) \
  while (false) CHECK(condition)
#else
#define DCHECK(condition) CHECK(condition)
#endif
