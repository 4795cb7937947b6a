// SPDX-License-Identifier: Apache-2.0
#include "daemon/server/wire.h"

#include <bit>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace zerod::server {
namespace {

static_assert(std::endian::native == std::endian::little);

// One description of each type's fields serves both directions: Archive is Writer or Reader.

class Writer {
 public:
  static constexpr bool kReads = false;

  template <typename T>
  void Number(const T& value) {
    static_assert(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void Bool(const bool& value) { Number<uint8_t>(value ? 1 : 0); }
  template <typename E>
  void Enum(const E& value, uint32_t /*last*/) {
    Number<uint8_t>(static_cast<uint8_t>(value));
  }
  void String(const std::string& value) {
    Number<uint32_t>(static_cast<uint32_t>(value.size()));
    out_ += value;
  }
  void Bits(const std::vector<bool>& bits) {
    Number<uint32_t>(static_cast<uint32_t>(bits.size()));
    for (size_t i = 0; i < bits.size(); i += 8) {
      uint8_t byte = 0;
      for (size_t j = i; j < bits.size() && j < i + 8; ++j) {
        byte |= static_cast<uint8_t>(bits[j] ? 1u << (j - i) : 0u);
      }
      Number(byte);
    }
  }
  void StatusValue(const absl::Status& status) {
    // A failure without a reason is still a failure: OK cannot be said.
    const absl::Status said = status.ok() ? absl::UnknownError("failed without a reason") : status;
    Number<uint8_t>(static_cast<uint8_t>(said.code()));
    String(std::string(said.message()));
  }
  template <typename T, typename F>
  void List(const std::vector<T>& list, size_t /*element_bytes_min*/, F&& field) {
    Number<uint32_t>(static_cast<uint32_t>(list.size()));
    for (const T& element : list) field(*this, element);
  }
  bool ok() const { return true; }
  std::string Take() { return std::move(out_); }

 private:
  std::string out_;
};

class Reader {
 public:
  static constexpr bool kReads = true;

  explicit Reader(absl::string_view in) : in_(in) {}

  template <typename T>
  void Number(T& value) {
    if (!Has(sizeof(T))) return;
    memcpy(&value, in_.data(), sizeof(T));
    in_.remove_prefix(sizeof(T));
  }
  void Bool(bool& value) {
    uint8_t byte = 0;
    Number(byte);
    if (byte > 1) ok_ = false;
    value = byte == 1;
  }
  template <typename E>
  void Enum(E& value, uint32_t last) {
    uint8_t byte = 0;
    Number(byte);
    if (byte > last) ok_ = false;
    if (ok_) value = static_cast<E>(byte);
  }
  void String(std::string& value) {
    uint32_t length = 0;
    Number(length);
    if (!Has(length)) return;
    value.assign(in_.data(), length);
    in_.remove_prefix(length);
  }
  void Bits(std::vector<bool>& bits) {
    uint32_t length = 0;
    Number(length);
    const size_t bytes = (size_t{length} + 7) / 8;
    if (!Has(bytes)) return;
    bits.resize(length);
    for (size_t i = 0; i < bytes * 8; ++i) {
      const bool bit = ((static_cast<uint8_t>(in_[i / 8]) >> (i % 8)) & 1) != 0;
      if (i < length) {
        bits[i] = bit;
      } else if (bit) {
        ok_ = false;  // one encoding per message
      }
    }
    in_.remove_prefix(bytes);
  }
  void StatusValue(absl::Status& status) {
    uint8_t code = 0;
    Number(code);
    std::string text;
    String(text);
    if (code == 0 || code > static_cast<uint8_t>(absl::StatusCode::kUnauthenticated)) ok_ = false;
    if (ok_) status = absl::Status(static_cast<absl::StatusCode>(code), text);
  }
  // `element_bytes_min`: what an element takes at the least, so that a length which cannot be true
  // takes no memory.
  template <typename T, typename F>
  void List(std::vector<T>& list, size_t element_bytes_min, F&& field) {
    uint32_t length = 0;
    Number(length);
    if (!Has(size_t{length} * element_bytes_min)) return;
    for (uint32_t i = 0; i < length && ok_; ++i) field(*this, list.emplace_back());
  }
  bool Has(size_t bytes) {
    if (bytes > in_.size()) ok_ = false;
    return ok_;
  }
  bool ok() const { return ok_; }
  bool at_end() const { return in_.empty(); }

 private:
  absl::string_view in_;
  bool ok_ = true;
};

// A reference that is const where the archive only looks.
template <typename A, typename T>
using Ref = std::conditional_t<A::kReads, T&, const T&>;

template <typename A>
void Hash(A& a, Ref<A, Hash128> v) {
  a.Number(v.low);
  a.Number(v.high);
}

constexpr size_t kGroupBytes = 21 * 8 + 6;

template <typename A>
void Hyper(A& a, Ref<A, core::HyperParameters> v) {
  a.Number(v.max_norm);
  a.Number(v.loss_scale);
  a.Bool(v.want_norm);
  a.List(v.groups, kGroupBytes, [](A& b, Ref<A, core::Group> g) {
    b.Number(g.lr);
    b.Number(g.beta1);
    b.Number(g.beta2);
    b.Number(g.eps);
    b.Number(g.weight_decay);
    b.Number(g.momentum);
    b.Number(g.dampening);
    b.Number(g.lr_decay);
    b.Number(g.initial_accumulator_value);
    b.Bool(g.decoupled);
    b.Bool(g.bias_correction);
    b.Bool(g.nesterov);
    b.Number(g.min_coeff);
    b.Number(g.max_coeff);
    b.Bool(g.eps_inside_sqrt);
    b.Bool(g.standard_newton_schulz);
    b.Bool(g.centered);
    b.Number(g.alpha);
    b.Number(g.rho);
    b.Number(g.momentum_decay);
    b.Number(g.eta_minus);
    b.Number(g.eta_plus);
    b.Number(g.step_min);
    b.Number(g.step_max);
    b.Number(g.lambd);
    b.Number(g.t0);
    b.Number(g.lr_before);
  });
}

template <typename T, typename A, typename F>
void Optional(A& a, Ref<A, std::optional<T>> v, F&& field) {
  bool there = v.has_value();
  a.Bool(there);
  if constexpr (A::kReads) {
    if (!there || !a.ok()) return;
    v.emplace();
  }
  if (there) field(a, *v);
}

template <typename A>
void Scalars(A& a, Ref<A, core::ScalarValues> v) {
  a.Enum(v.op, static_cast<uint32_t>(core::ScalarOp::kMax));
  a.List(v.values, 8, [](A& b, Ref<A, double> x) { b.Number(x); });
  Optional<Hash128>(a, v.restore, [](A& b, Ref<A, Hash128> x) { Hash(b, x); });
}

template <typename A>
void LossScaler(A& a, Ref<A, core::LossScalerState> v) {
  a.Number(v.scale);
  a.Number(v.iterations);
  a.Number(v.last_overflow);
  a.Number(v.hysteresis);
}

template <typename A>
void Progress(A& a, Ref<A, core::OptimizerProgress> v) {
  a.List(v.parameter_steps, 8, [](A& b, Ref<A, uint64_t> x) { b.Number(x); });
  Optional<core::LossScalerState>(
      a, v.loss_scaler, [](A& b, Ref<A, core::LossScalerState> x) { LossScaler(b, x); });
}

template <typename A>
void Squares(A& a, Ref<A, std::vector<core::TensorSquares>> v) {
  a.List(v, 16, [](A& b, Ref<A, core::TensorSquares> x) {
    b.Number(x.weight);
    b.Number(x.update);
  });
}

template <typename A>
void DecisionFields(A& a, Ref<A, core::Decision> v) {
  a.Enum(v.kind, static_cast<uint32_t>(core::Decision::Kind::kRefuse));
  a.Number(v.grad_norm);
  a.Number(v.grad_scale);
  a.Number(v.next_loss_scale);
  LossScaler(a, v.loss_scaler);
  Hyper(a, v.hyper);
  a.Bits(v.touched);
  a.String(v.reason);
}

constexpr size_t kEntryBytesMin = 64;

template <typename A>
void EntryFields(A& a, Ref<A, core::Entry> v) {
  a.Number(v.seq);
  a.Number(v.generation);
  a.Enum(v.kind, static_cast<uint32_t>(core::kEntryKindLast));
  a.Number(v.unit);
  a.Number(v.step);
  a.Number(v.round);
  a.Number(v.wants);
  a.Number(v.origin);
  a.Number(v.slot);
  a.Number(v.begin);
  a.Number(v.count);
  a.Enum(v.state_kind, static_cast<uint32_t>(core::StateKind::kGradient));
  a.Number(v.ordinal);
  Scalars(a, v.scalar);
  a.Number(v.rank);
  a.String(v.reason);
  a.Bool(v.norm_needed);
  // Commits alone carry a decision: the others are many.
  if (v.kind == core::EntryKind::kCommit) DecisionFields(a, v.decision);
  if (v.kind == core::EntryKind::kRestore) Progress(a, v.restore);
  if (v.kind == core::EntryKind::kTensorNorms) Squares(a, v.squares);
}

template <typename A>
void Item(A& a, Ref<A, core::Joined> v) {
  Hash(a, v.layout);
  Hash(a, v.config);
  a.Number(v.world);
  a.Number(v.members);
}
template <typename A>
void Item(A& a, Ref<A, core::ClientAttached> v) {
  a.Number(v.rank);
}
template <typename A>
void Item(A& a, Ref<A, core::ClientGone> v) {
  a.Number(v.rank);
  a.Bool(v.left);
  a.String(v.reason);
}
template <typename A>
void Item(A& a, Ref<A, core::Want> v) {
  a.Number(v.unit);
  a.Number(v.version);
  a.Bool(v.demand);
  a.Bool(v.again);
}
template <typename A>
void Item(A& a, Ref<A, core::GradientsReady> v) {
  a.Number(v.unit);
  a.Number(v.step);
  a.Number(v.round);
}
template <typename A>
void Item(A& a, Ref<A, core::StepReady> v) {
  a.Number(v.step);
  a.Bool(v.agree);
  a.String(v.disagreement);
  Hyper(a, v.hyper);
  a.List(v.ranks, 4, [](A& b, Ref<A, core::Rank> x) { b.Number(x); });
}
template <typename A>
void Item(A& a, Ref<A, core::NormReady> v) {
  a.Number(v.step);
  a.List(v.part.block_squares, 8, [](A& b, Ref<A, double> x) { b.Number(x); });
  a.Bits(v.part.touched);
  a.Bool(v.part.nonfinite);
}
template <typename A>
void Item(A& a, Ref<A, core::TensorsMeasured> v) {
  a.Number(v.step);
  Squares(a, v.squares);
}
template <typename A>
void Item(A& a, Ref<A, core::StateRequest> v) {
  a.Bool(v.put);
  a.Number(v.slot);
  a.Number(v.unit);
  a.Number(v.begin);
  a.Number(v.count);
  a.Enum(v.kind, static_cast<uint32_t>(core::StateKind::kGradient));
}
template <typename A>
void Item(A& a, Ref<A, core::ScalarReady> v) {
  a.Number(v.ordinal);
  a.List(v.ranks, 4, [](A& b, Ref<A, core::Rank> x) { b.Number(x); });
  a.List(v.values, 6, [](A& b, Ref<A, core::ScalarValues> x) { Scalars(b, x); });
  Progress(a, v.restore);
}
template <typename A>
void Item(A& a, Ref<A, core::Failed> v) {
  a.StatusValue(v.status);
  a.Bool(v.discard);
}
template <typename A>
void Item(A& a, Ref<A, core::Forecasted> v) {
  a.Number(v.version);
}

// A variant is its index, then what it holds.
template <typename Variant, size_t kIndex = 0>
void MakeAlternative(uint32_t index, Variant& v) {
  if constexpr (kIndex < std::variant_size_v<Variant>) {
    if (index == kIndex) {
      v.template emplace<kIndex>();
    } else {
      MakeAlternative<Variant, kIndex + 1>(index, v);
    }
  }
}

template <typename Variant, typename A, typename F>
void VariantFields(A& a, Ref<A, Variant> v, F&& field) {
  if constexpr (A::kReads) {
    uint8_t index = 0;
    a.Enum(index, std::variant_size_v<Variant> - 1);
    if (!a.ok()) return;
    MakeAlternative(index, v);
  } else {
    a.template Number<uint8_t>(static_cast<uint8_t>(v.index()));
  }
  std::visit(field, v);
}

template <typename A>
void Body(A& a, Ref<A, core::Report> v) {
  a.Number(v.generation);
  a.List(v.items, 5, [](A& b, Ref<A, core::ReportItem> item) {
    VariantFields<core::ReportItem>(b, item, [&b](auto& x) { Item<A>(b, x); });
  });
}
template <typename A>
void Body(A& a, Ref<A, core::Append> v) {
  a.List(v.entries, kEntryBytesMin, [](A& b, Ref<A, core::Entry> x) { EntryFields(b, x); });
}
template <typename A>
void Body(A& a, Ref<A, core::FailJob> v) {
  a.StatusValue(v.status);
  a.Bool(v.discard);
}

template <typename A>
void MessageFields(A& a, Ref<A, core::Message> v) {
  VariantFields<core::Message>(a, v, [&a](auto& x) { Body<A>(a, x); });
}

}  // namespace

std::string EncodeMessage(const core::Message& message) {
  Writer writer;
  writer.Number(kWireMagic);
  writer.Number(kWireVersion);
  MessageFields(writer, message);
  return writer.Take();
}

absl::StatusOr<core::Message> DecodeMessage(absl::string_view bytes) {
  Reader reader(bytes);
  uint32_t magic = 0;
  uint16_t version = 0;
  reader.Number(magic);
  reader.Number(version);
  if (!reader.ok() || magic != kWireMagic) {
    return absl::InvalidArgumentError("another daemon sent bytes that are no message");
  }
  if (version != kWireVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("another daemon speaks message version ", version, ", this one ",
                     kWireVersion, ": run the same version on all nodes"));
  }
  core::Message message;
  MessageFields(reader, message);
  if (!reader.ok() || !reader.at_end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("another daemon sent a damaged message of ", bytes.size(), " bytes"));
  }
  return message;
}

}  // namespace zerod::server
