// SPDX-License-Identifier: Apache-2.0
#include "proto/shm/fd_passing.h"

#include <errno.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "absl/time/clock.h"
#include "proto/shm/fd_socket.h"

namespace zerod::shm {
namespace {

constexpr absl::Duration kLong = absl::Seconds(30);
constexpr absl::Duration kShort = absl::Milliseconds(20);

size_t OpenFds() {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

class FdPassingTest : public ::testing::Test {
 protected:
  void SetUp() override {
    fds_before_ = OpenFds();
    int pair[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    left_.Reset(pair[0]);
    right_.Reset(pair[1]);
  }
  void TearDown() override {
    left_.Reset();
    right_.Reset();
    EXPECT_EQ(OpenFds(), fds_before_) << "descriptors leaked";
  }
  size_t fds_before_ = 0;
  UniqueFd left_, right_;
};

ino_t Inode(int fd) {
  struct stat info = {};
  EXPECT_EQ(fstat(fd, &info), 0);
  return info.st_ino;
}

TEST_F(FdPassingTest, CarriesMessageAndDescriptorsInOrder) {
  std::vector<UniqueFd> sent;
  std::vector<int> raw;
  for (uint32_t i = 0; i <= kClientFiles; ++i) {
    sent.emplace_back(memfd_create("file", MFD_CLOEXEC));
    raw.push_back(sent.back().get());
  }
  FdFiles files{};
  files.magic = kMagic;
  files.files = kClientFiles + 1;
  ASSERT_TRUE(SendFds(left_.get(), &files, sizeof(files), raw, kLong).ok());
  FdFiles got{};
  auto fds = ReceiveFds(right_.get(), &got, sizeof(got), kClientFiles + 1, kLong);
  ASSERT_TRUE(fds.ok()) << fds.status();
  EXPECT_EQ(got.magic, kMagic);
  ASSERT_EQ(fds->size(), kClientFiles + 1);
  for (size_t i = 0; i < fds->size(); ++i) {
    EXPECT_EQ(Inode((*fds)[i].get()), Inode(raw[i]));
    EXPECT_NE(fcntl((*fds)[i].get(), F_GETFD) & FD_CLOEXEC, 0);
  }
}

TEST_F(FdPassingTest, RefusalCarriesNoDescriptors) {
  FdFiles files{};
  files.code = 9;
  ASSERT_TRUE(SendFds(left_.get(), &files, sizeof(files), {}, kLong).ok());
  FdFiles got{};
  auto fds = ReceiveFds(right_.get(), &got, sizeof(got), kClientFiles + 1, kLong);
  ASSERT_TRUE(fds.ok()) << fds.status();
  EXPECT_EQ(got.code, 9u);
  EXPECT_TRUE(fds->empty());
}

TEST_F(FdPassingTest, UnwantedDescriptorsAreClosedAndRefused) {
  const UniqueFd file(memfd_create("file", MFD_CLOEXEC));
  const std::vector<int> many(kFdsMax, file.get());
  FdHello hello{};
  for (size_t count : {size_t{1}, kFdsMax}) {
    ASSERT_TRUE(SendFds(left_.get(), &hello, sizeof(hello),
                        absl::MakeConstSpan(many).first(count), kLong).ok());
    const size_t before = OpenFds();
    EXPECT_EQ(ReceiveFds(right_.get(), &hello, sizeof(hello), 0, kLong).status().code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(OpenFds(), before);
    // Nobody goes on with a socket after an error; here it is only emptied for the next round.
    char rest[sizeof(hello)];
    while (recv(right_.get(), rest, sizeof(rest), MSG_DONTWAIT) > 0) {
    }
  }
}

TEST_F(FdPassingTest, MoreDescriptorsThanTheBufferHoldsAreRefused) {
  // Around SendFds(), which would refuse.
  const UniqueFd file(memfd_create("file", MFD_CLOEXEC));
  const std::vector<int> many(kFdsMax + 30, file.get());
  std::vector<char> control(CMSG_SPACE(many.size() * sizeof(int)));
  FdHello hello{};
  iovec part{&hello, sizeof(hello)};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control.data();
  header.msg_controllen = control.size();
  cmsghdr* c = CMSG_FIRSTHDR(&header);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(many.size() * sizeof(int));
  memcpy(CMSG_DATA(c), many.data(), many.size() * sizeof(int));
  ASSERT_EQ(sendmsg(left_.get(), &header, 0), static_cast<ssize_t>(sizeof(hello)));
  const size_t before = OpenFds();
  EXPECT_EQ(ReceiveFds(right_.get(), &hello, sizeof(hello), kFdsMax, kLong).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(OpenFds(), before);
}

TEST_F(FdPassingTest, AMessageInPiecesArrivesWhole) {
  FdHello hello{kMagic, kFormatVersion, 77};
  std::thread sender([&] {
    const char* bytes = reinterpret_cast<const char*>(&hello);
    for (size_t i = 0; i < sizeof(hello); ++i) {
      EXPECT_EQ(send(left_.get(), bytes + i, 1, MSG_NOSIGNAL), 1);
      std::this_thread::yield();
    }
  });
  FdHello got{};
  EXPECT_TRUE(ReceiveFds(right_.get(), &got, sizeof(got), 0, kLong).ok());
  sender.join();
  EXPECT_EQ(got.reserved, 77u);
}

TEST_F(FdPassingTest, HalfAMessageIsADeadline) {
  FdHello hello{};
  ASSERT_EQ(send(left_.get(), &hello, sizeof(hello) / 2, 0), ssize_t{sizeof(hello) / 2});
  const absl::Time start = absl::Now();
  EXPECT_EQ(ReceiveFds(right_.get(), &hello, sizeof(hello), 0, kShort).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_GE(absl::Now() - start, kShort);
}

TEST_F(FdPassingTest, OneWhoDoesNotReadIsADeadline) {
  const std::vector<char> large(8 << 20);
  EXPECT_EQ(SendFds(left_.get(), large.data(), large.size(), {}, kShort).code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(FdPassingTest, AClosedSocketIsUnavailable) {
  left_.Reset();
  FdHello hello{};
  EXPECT_EQ(ReceiveFds(right_.get(), &hello, sizeof(hello), 0, kLong).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(SendFds(right_.get(), &hello, sizeof(hello), {}, kLong).code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(FdPassingTest, UniqueFdOwns) {
  UniqueFd a(eventfd(0, EFD_CLOEXEC));
  const int raw = a.get();
  UniqueFd b(std::move(a));
  EXPECT_FALSE(a);
  EXPECT_EQ(b.get(), raw);
  a = std::move(b);
  EXPECT_EQ(a.get(), raw);
  a.Reset();
  EXPECT_EQ(fcntl(raw, F_GETFD), -1);
}

}  // namespace
}  // namespace zerod::shm
