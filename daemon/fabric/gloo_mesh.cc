// SPDX-License-Identifier: Apache-2.0
#include "daemon/fabric/gloo_mesh.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include <gloo/transport/tcp/address.h>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "daemon/fabric/threads.h"

namespace zerod::fabric {

// Closes all pairs when the deadline passes or `cancel` says so, which ends a Pair::connect that
// waits for a peer.
class ConnectDeadline {
 public:
  ConnectDeadline(Mesh* mesh, SteadyTime deadline, std::shared_ptr<ConnectCancel> cancel)
      : cancel_(cancel != nullptr ? std::move(cancel) : std::make_shared<ConnectCancel>()) {
    BlockSignals inherited;
    thread_ = std::thread([this, mesh, deadline] { Run(mesh, deadline); });
  }
  ~ConnectDeadline() {
    {
      std::lock_guard<std::mutex> lock(cancel_->mutex_);
      over_ = true;
    }
    cancel_->changed_.notify_all();
    thread_.join();
  }

 private:
  void Run(Mesh* mesh, SteadyTime deadline) {
    std::unique_lock<std::mutex> lock(cancel_->mutex_);
    cancel_->changed_.wait_until(lock, deadline, [&] { return over_ || cancel_->cancelled_; });
    while (!over_) {
      lock.unlock();
      mesh->CloseHard();
      lock.lock();
      // Again, for a connect that was just about to begin.
      cancel_->changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return over_; });
    }
  }

  const std::shared_ptr<ConnectCancel> cancel_;
  bool over_ = false;  // guarded by cancel_->mutex_
  std::thread thread_;
};

namespace {

namespace tcp = gloo::transport::tcp;

// Gloo's messages begin with "[file:line] ".
std::string Words(const std::string& message) {
  const size_t end = message.find("] ");
  return !message.empty() && message[0] == '[' && end != std::string::npos
             ? message.substr(end + 2)
             : message;
}

absl::Duration Left(SteadyTime deadline) {
  const auto left = deadline - std::chrono::steady_clock::now();
  return std::max(absl::FromChrono(left), absl::ZeroDuration());
}

std::string KeyOf(uint32_t rank) { return absl::StrCat("fabric/gloo/", rank); }

// What a member tells the others: version, size, segment_bytes, then for each other member in
// rank order the address at which it is awaited (Gloo's bytes, in hex).
std::string Announcement(const FabricOptions& options, Mesh& mesh) {
  std::string out = absl::StrCat("1 ", options.size, " ", options.segment_bytes);
  for (uint32_t peer = 0; peer < options.size; ++peer) {
    if (peer == options.rank) continue;
    const std::vector<char> address = mesh.pair(peer).address().bytes();
    absl::StrAppend(&out, " ",
                    absl::BytesToHexString(absl::string_view(address.data(), address.size())));
  }
  return out;
}

// The address at which `peer`, whose announcement is given, awaits this member.
absl::StatusOr<std::vector<char>> AddressIn(const std::string& announcement, uint32_t peer,
                                            const FabricOptions& options) {
  const std::vector<std::string> fields = absl::StrSplit(announcement, ' ');
  uint64_t size = 0;
  uint64_t segment_bytes = 0;
  if (fields.size() < 3 || fields[0] != "1" || !absl::SimpleAtoi(fields[1], &size) ||
      !absl::SimpleAtoi(fields[2], &segment_bytes)) {
    return absl::FailedPreconditionError(
        absl::StrCat("member ", peer, " announced itself in a form that this version does not ",
                     "know: run the same version of the daemon on all members"));
  }
  if (size != options.size || segment_bytes != options.segment_bytes) {
    return absl::FailedPreconditionError(absl::StrCat(
        "member ", peer, " was started for ", size, " members and segments of ", segment_bytes,
        " bytes, member ", options.rank, " for ", options.size, " and ", options.segment_bytes,
        ": give all members the same configuration"));
  }
  const uint32_t place = options.rank > peer ? options.rank - 1 : options.rank;
  const std::string bytes =
      fields.size() == 2 + options.size ? absl::HexStringToBytes(fields[3 + place]) : "";
  // Only what has the length of Gloo's address may reach its decoder, which copies blindly.
  if (bytes.size() != tcp::Address(sockaddr_storage{}).bytes().size()) {
    return absl::FailedPreconditionError(
        absl::StrCat("member ", peer, " announced an address that cannot be read"));
  }
  return std::vector<char>(bytes.begin(), bytes.end());
}

// Whether this host has the address: bind() knows.
bool CanBind(const addrinfo& address) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  const bool bound = bind(fd, address.ai_addr, address.ai_addrlen) == 0;
  close(fd);
  return bound;
}

bool IsWildcard(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr == INADDR_ANY;
  }
  return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

// Gloo's own look-up reads an uninitialised pointer where the name does not resolve, and leaks
// where it cannot bind; so this is ours.
absl::StatusOr<tcp::attr> AttributesOf(const std::string& bind_host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = bind_host.empty() ? EAI_NONAME
                                      : getaddrinfo(bind_host.c_str(), nullptr, &hints, &found);
  std::string why = error != 0 ? gai_strerror(error) : "no interface of this host has it";
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, &freeaddrinfo);
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    if (each->ai_family != AF_INET && each->ai_family != AF_INET6) continue;
    if (IsWildcard(each->ai_addr)) {
      why = "peers cannot connect to a wildcard";
      continue;
    }
    if (!CanBind(*each)) continue;
    tcp::attr attributes(bind_host.c_str());
    attributes.ai_family = each->ai_family;
    attributes.ai_socktype = each->ai_socktype;
    attributes.ai_protocol = each->ai_protocol;
    attributes.ai_addr = {};
    std::memcpy(&attributes.ai_addr, each->ai_addr, each->ai_addrlen);
    attributes.ai_addrlen = static_cast<int>(each->ai_addrlen);
    return attributes;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "the fabric cannot bind to '", bind_host, "' (", why,
      "): name an address of this host, such as that of its fast network interface"));
}

// The announcements of all others, or who is missing.
absl::StatusOr<std::vector<std::string>> Announcements(const FabricOptions& options,
                                                       Rendezvous* rendezvous,
                                                       SteadyTime deadline) {
  std::vector<std::string> out(options.size);
  std::vector<uint32_t> missing;
  for (uint32_t peer = 0; peer < options.size; ++peer) {
    if (peer == options.rank) continue;
    absl::StatusOr<std::string> got = rendezvous->Get(KeyOf(peer), Left(deadline));
    if (got.ok()) {
      out[peer] = *std::move(got);
    } else if (absl::IsDeadlineExceeded(got.status())) {
      missing.push_back(peer);
    } else {
      return got.status();
    }
  }
  if (missing.empty()) return out;
  return absl::DeadlineExceededError(absl::StrCat(
      "member ", absl::StrJoin(missing, ", "), " of ", options.size, " did not come within ",
      absl::FormatDuration(options.connect_timeout),
      ": see whether its daemon runs and was given this job"));
}

}  // namespace

bool PolledBuffer::complete() {
  std::lock_guard<std::mutex> lock(m_);
  return sendCompletions_ + recvCompletions_ > 0;
}

MeshPair::MeshPair(tcp::Context* context, tcp::Device* device, int peer,
                   std::chrono::milliseconds timeout, MeshObserver* observer)
    : Pair(context, device, peer, timeout), observer_(observer) {
  // A child process that kept a copy would hide this member's death from its peers.
  fcntl(fd_, F_SETFD, FD_CLOEXEC);
  Touch();
}

MeshPair::~MeshPair() {
  // Here and not in ~Pair, so that the loop thread meets no half-destroyed object.
  {
    std::lock_guard<std::mutex> lock(m_);
    if (state_ != CLOSED) Pair::changeState(CLOSED);
  }
  // Where the loop thread closed the pair itself, it may still be on its way out.
  std::lock_guard<std::mutex> handler_left(in_handler_);
}

bool MeshPair::connected() {
  std::lock_guard<std::mutex> lock(m_);
  return state_ == CONNECTED;
}

std::string MeshPair::reason() {
  std::lock_guard<std::mutex> lock(m_);
  if (!protocol_error_.empty()) return protocol_error_;
  if (ex_ == nullptr) return "closed by this member";
  try {
    std::rethrow_exception(ex_);
  } catch (const std::exception& e) {
    return Words(e.what());
  }
}

void MeshPair::Touch() {
  last_byte_.store(std::chrono::steady_clock::now().time_since_epoch().count(),
                   std::memory_order_relaxed);
}

void MeshPair::handleEvents(int events) {
  std::lock_guard<std::mutex> here(in_handler_);
  try {
    Pair::handleEvents(events);
  } catch (const std::exception& e) {
    // What the peer sent makes no sense to Gloo, or the socket is broken.
    std::lock_guard<std::mutex> lock(m_);
    if (state_ != CLOSED) {
      protocol_error_ = Words(e.what());
      changeState(CLOSED);
    }
  }
  if (dirty_.exchange(false)) observer_->OnProgress();
}

// The pair's lock is held in the following three.

bool MeshPair::read() {
  const size_t nread = rx_.nread;
  const bool complete = Pair::read();
  if (complete || rx_.nread != nread) Touch();
  if (complete) dirty_ = true;
  // One message for each tick of the loop: the lock is free in between, so that the next
  // segments are posted while data keeps coming. The loop is level-triggered and comes back.
  return false;
}

bool MeshPair::write(tcp::Op& op) {
  const size_t nwritten = op.nwritten;
  const bool complete = Pair::write(op);
  if (op.getOpcode() == tcp::Op::SEND_UNBOUND_BUFFER) {
    if (op.nwritten != nwritten) Touch();
    if (complete) dirty_ = true;
  }
  return complete;
}

void MeshPair::changeState(state next) noexcept {
  Pair::changeState(next);
  if (next == CONNECTED) fcntl(fd_, F_SETFD, FD_CLOEXEC);
  if (next != CLOSED) return;
  closed_.store(true, std::memory_order_release);
  observer_->OnProgress();
}

std::unique_ptr<gloo::transport::Pair>& MeshContext::createPair(int peer) {
  auto* device = static_cast<tcp::Device*>(device_.get());
  pairs_[peer] = std::make_unique<MeshPair>(this, device, peer, getTimeout(), observer_);
  return pairs_[peer];
}

absl::StatusOr<std::unique_ptr<Mesh>> Mesh::Connect(const FabricOptions& options,
                                                    Rendezvous* rendezvous,
                                                    MeshObserver* observer) {
  const SteadyTime deadline =
      std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(options.connect_timeout);
  ASSIGN_OR_RETURN(tcp::attr attributes, AttributesOf(options.bind_host));
  try {
    std::shared_ptr<tcp::Device> device;
    {
      BlockSignals inherited_by_the_loop_thread;
      device = std::make_shared<tcp::Device>(attributes);
    }
    auto context = std::make_shared<MeshContext>(std::move(device), options, observer);
    context->setTimeout(absl::ToChronoMilliseconds(options.connect_timeout) +
                        std::chrono::milliseconds(1));
    auto mesh = std::make_unique<Mesh>(std::move(context));
    RETURN_IF_ERROR(mesh->ConnectPairs(options, rendezvous, deadline));
    return mesh;
  } catch (const std::exception& e) {
    return absl::UnavailableError(
        absl::StrCat("the fabric could not be set up: ", Words(e.what())));
  }
}

absl::Status Mesh::ConnectPairs(const FabricOptions& options, Rendezvous* rendezvous,
                                SteadyTime deadline) {
  for (uint32_t peer = 0; peer < options.size; ++peer) {
    if (peer != options.rank) context_->createPair(peer);
  }
  RETURN_IF_ERROR(rendezvous->Set(KeyOf(options.rank), Announcement(options, *this)));
  ASSIGN_OR_RETURN(std::vector<std::string> announcements,
                   Announcements(options, rendezvous, deadline));
  ConnectDeadline end_of_waiting(this, deadline, options.connect_cancel);
  for (uint32_t peer = 0; peer < options.size; ++peer) {
    if (peer == options.rank) continue;
    ASSIGN_OR_RETURN(std::vector<char> address, AddressIn(announcements[peer], peer, options));
    std::string why = "it announced itself, but then was silent";
    try {
      pair(peer).connect(address);
    } catch (const std::exception& e) {
      why = Words(e.what());
    }
    if (options.connect_cancel != nullptr && options.connect_cancel->cancelled()) {
      return absl::CancelledError("the fabric is no longer wanted");
    }
    if (pair(peer).connected()) continue;
    if (Left(deadline) == absl::ZeroDuration()) {
      return absl::DeadlineExceededError(
          absl::StrCat("member ", peer, " could not be connected to within ",
                       absl::FormatDuration(options.connect_timeout), " (", why,
                       "): see whether its daemon runs and its bind address can be reached"));
    }
    return absl::UnavailableError(
        absl::StrCat("member ", peer, " could not be connected to: ", why));
  }
  return absl::OkStatus();
}

Mesh::~Mesh() = default;

MeshPair& Mesh::pair(uint32_t peer) {
  return static_cast<MeshPair&>(*context_->getPair(static_cast<int>(peer)));
}

absl::StatusOr<std::unique_ptr<PolledBuffer>> Mesh::Post(uint32_t peer, bool send, uint64_t slot,
                                                         char* data, size_t bytes) {
  auto buffer = std::make_unique<PolledBuffer>(context_, data, bytes);
  try {
    if (send) {
      pair(peer).send(buffer.get(), slot, 0, bytes);
    } else {
      pair(peer).recv(buffer.get(), slot, 0, bytes);
    }
  } catch (const std::exception& e) {
    return absl::UnavailableError(Words(e.what()));
  }
  return buffer;
}

void Mesh::CloseHard() {
  for (int peer = 0; peer < context_->size; ++peer) {
    auto& each = context_->getPair(peer);
    if (each == nullptr) continue;
    try {
      each->close();
    } catch (const std::exception&) {
      // Only epoll_ctl on a descriptor that is gone already can fail here.
    }
  }
}

}  // namespace zerod::fabric
