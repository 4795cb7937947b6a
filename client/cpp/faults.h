// SPDX-License-Identifier: Apache-2.0
//
// A missed gather must be loud: the handler of SIGSEGV and SIGBUS that names the parameter, its
// unit and the step on standard error when a fault lies in a client's address range, and then lets
// the previous handler (or the default action) have the signal.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace zerod::client {

// Ranges that faults are looked up in at once.
inline constexpr int kFaultTablesMax = 64;

// What the handler reads. Everything is prepared beforehand: it allocates nothing and locks
// nothing. Constant once registered, but for the step and the held flags.
struct FaultTable {
  struct Place {  // a unit or a parameter: bytes [begin, end) of the range, sorted
    uint64_t begin = 0;
    uint64_t end = 0;
    std::string name;
  };
  uintptr_t base = 0;
  uint64_t bytes = 0;
  std::vector<Place> units;       // ascending
  std::vector<Place> parameters;  // ascending
  const std::atomic<uint64_t>* step = nullptr;
  const std::atomic<uint8_t>* held = nullptr;  // per unit
  std::vector<uint32_t> unit_index;            // parallel to `units`: index into `held`
};

// The table must stay as it is until UnregisterFaults. Installs the handlers the first time.
// False where kFaultTablesMax are registered already: faults are then not explained.
bool RegisterFaults(const FaultTable* table);
void UnregisterFaults(const FaultTable* table);

}  // namespace zerod::client
