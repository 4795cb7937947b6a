// SPDX-License-Identifier: Apache-2.0
//
// core::Message as bytes, for Peer.Link. Little-endian, no padding:
//   u32 magic, u16 version, u8 kind (index in core::Message), then the message's fields in the
//   order of daemon/core/types.h. A string or list is preceded by its u32 length; a list of bits is
//   its u32 length and then bytes, the first bit lowest, unused bits 0; an enum is a u8; a status
//   is a u8 code, never OK, and a string.
// There is one encoding of a message, so Encode(Decode(bytes)) gives the bytes back.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "daemon/core/types.h"

namespace zerod::server {

inline constexpr uint32_t kWireMagic = 0x57445a31;  // "1ZDW"
inline constexpr uint16_t kWireVersion = 3;

std::string EncodeMessage(const core::Message& message);

// INVALID_ARGUMENT where the bytes are no message of this version: nothing is read beyond them, and
// no more memory is taken than a bounded multiple of their length. Values are in the range of their
// type; whether they make sense is core's to check.
absl::StatusOr<core::Message> DecodeMessage(absl::string_view bytes);

}  // namespace zerod::server
