// SPDX-License-Identifier: Apache-2.0
#include "client/cpp/faults.h"

#include <signal.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <mutex>

namespace zerod::client {
namespace {

std::atomic<const FaultTable*> g_tables[kFaultTablesMax];
struct sigaction g_previous_segv;
struct sigaction g_previous_bus;

// A line that is put together without the heap and written at once, so that several ranks' lines
// do not mix. What does not fit is cut.
class Line {
 public:
  Line& operator<<(const char* text) {
    while (*text != '\0' && used_ < sizeof(text_) - 1) text_[used_++] = *text++;
    return *this;
  }
  Line& operator<<(uint64_t value) {
    char digits[21];
    int i = sizeof(digits) - 1;
    digits[i] = '\0';
    do {
      digits[--i] = static_cast<char>('0' + value % 10);
      value /= 10;
    } while (value != 0);
    return *this << digits + i;
  }
  void Write() {
    text_[used_++] = '\n';
    size_t written = 0;
    while (written < used_) {
      const ssize_t n = write(STDERR_FILENO, text_ + written, used_ - written);
      if (n <= 0) return;
      written += static_cast<size_t>(n);
    }
  }

 private:
  char text_[1024];
  size_t used_ = 0;
};

// The index of the place that has `offset`, or of the last one before it; -1: none.
int64_t FindPlace(const std::vector<FaultTable::Place>& places, uint64_t offset) {
  int64_t low = 0;
  int64_t high = static_cast<int64_t>(places.size());
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (places[middle].begin <= offset) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// 1: a write, 0: a read, -1: this CPU does not tell.
int FaultWrote(const void* context) {
#if defined(__x86_64__)
  const auto* ucontext = static_cast<const ucontext_t*>(context);
  return (ucontext->uc_mcontext.gregs[REG_ERR] & 2) != 0 ? 1 : 0;
#else
  (void)context;
  return -1;
#endif
}

void Explain(const FaultTable& table, uint64_t offset, int signal_number, const void* context) {
  Line line;
  line << "zerod: pid " << static_cast<uint64_t>(getpid());
  const int64_t unit = FindPlace(table.units, offset);
  const int64_t parameter = FindPlace(table.parameters, offset);
  const bool held =
      unit >= 0 && table.held[table.unit_index[unit]].load(std::memory_order_relaxed) != 0;
  const int wrote = FaultWrote(context);
  const bool write = wrote == 1 || (wrote == -1 && held);
  line << (write ? " wrote to " : " read ");
  if (parameter >= 0 && offset < table.parameters[parameter].end) {
    line << "parameter '" << table.parameters[parameter].name.c_str() << "'";
  } else {
    line << "memory beside the parameters";
  }
  if (unit >= 0) line << " of unit '" << table.units[unit].name.c_str() << "'";
  line << " in step " << table.step->load(std::memory_order_relaxed);
  if (signal_number == SIGBUS) {
    line << ", but the memory behind it is gone: the daemon has ended, or the machine is out of "
            "memory";
  } else if (write) {
    line << ": parameters are read-only for the training process; change them inside "
            "zerod.GatheredParameters, or by load_state_dict()";
  } else if (held) {
    line << ", which is gathered, but nothing is mapped there: this is a bug in zerod";
  } else {
    line << ", but the unit is not gathered: it was used outside the forward or backward pass of "
            "its module; read it inside zerod.GatheredParameters, or name its users in the "
            "configuration's zerod.units";
  }
  line.Write();
}

void Chain(const struct sigaction& previous, int signal_number, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal_number, info, context);
    return;
  }
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal_number);
    return;
  }
  // An ignored fault would come back for ever; the default action ends the process when the
  // instruction is tried again, or by raise() where there is none to try.
  struct sigaction fallback {};
  fallback.sa_handler = SIG_DFL;
  sigaction(signal_number, &fallback, nullptr);
  if (info->si_code <= 0) raise(signal_number);
}

void OnFault(int signal_number, siginfo_t* info, void* context) {
  if (info->si_code > 0) {  // by the kernel: the address means something
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    for (const auto& slot : g_tables) {
      const FaultTable* table = slot.load(std::memory_order_acquire);
      if (table != nullptr && address >= table->base && address - table->base < table->bytes) {
        Explain(*table, address - table->base, signal_number, context);
        break;
      }
    }
  }
  Chain(signal_number == SIGBUS ? g_previous_bus : g_previous_segv, signal_number, info, context);
}

void Install() {
  struct sigaction action {};
  action.sa_sigaction = OnFault;
  // The handler may run on a thread whose stack is what overflowed.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  // The previous ones must be known before ours can run.
  sigaction(SIGSEGV, nullptr, &g_previous_segv);
  sigaction(SIGBUS, nullptr, &g_previous_bus);
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

}  // namespace

bool RegisterFaults(const FaultTable* table) {
  static std::once_flag installed;
  std::call_once(installed, Install);
  for (auto& slot : g_tables) {
    const FaultTable* none = nullptr;
    if (slot.compare_exchange_strong(none, table, std::memory_order_release)) return true;
  }
  return false;
}

void UnregisterFaults(const FaultTable* table) {
  for (auto& slot : g_tables) {
    const FaultTable* same = table;
    slot.compare_exchange_strong(same, nullptr, std::memory_order_release);
  }
}

}  // namespace zerod::client
