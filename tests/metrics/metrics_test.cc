// SPDX-License-Identifier: Apache-2.0
#include "daemon/metrics/metrics.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace zerod::metrics {
namespace {

struct Scrape {
  struct Family {
    std::string type;
    std::set<std::string> labels;
  };
  std::map<std::string, Family> families;
  std::map<std::string, double> samples;  // "name{labels}" -> value
};

// One GET over a plain socket; the body.
std::string HttpGet(const std::string& address) {
  const size_t colon = address.rfind(':');
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(std::atoi(address.c_str() + colon + 1)));
  EXPECT_EQ(inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr), 1);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0) << address;
  const timeval limit{10, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  std::string answer;
  char part[4096];
  for (ssize_t n; (n = recv(fd, part, sizeof(part), 0)) > 0;) answer.append(part, n);
  close(fd);
  EXPECT_THAT(answer, testing::StartsWith("HTTP/1.1 200"));
  return answer.substr(answer.find("\r\n\r\n") + 4);
}

// The labels of `{a="x",b="y"}`, without those that the format itself adds.
std::set<std::string> LabelNames(const std::string& braces) {
  std::set<std::string> names;
  size_t at = 0;
  while ((at = braces.find("=\"", at)) != std::string::npos) {
    const size_t begin = braces.find_last_of("{,", at) + 1;
    names.insert(braces.substr(begin, at - begin));
    at = braces.find('"', at + 2);
  }
  names.erase("le");
  names.erase("quantile");
  return names;
}

Scrape Parse(const std::string& text) {
  Scrape scrape;
  std::istringstream in(text);
  std::string family;
  for (std::string line; std::getline(in, line);) {
    if (line.empty()) continue;
    std::istringstream words(line);
    if (line[0] == '#') {
      std::string hash, what, name, rest;
      words >> hash >> what >> name >> rest;
      EXPECT_TRUE(what == "HELP" || what == "TYPE") << line;
      if (what == "TYPE") {
        EXPECT_EQ(scrape.families.count(name), 0u) << "declared twice: " << name;
        scrape.families[name].type = rest;
        family = name;
      }
      continue;
    }
    const size_t space = line.rfind(' ');
    const std::string series = line.substr(0, space);
    const size_t brace = series.find('{');
    EXPECT_EQ(series.compare(0, family.size(), family), 0) << line << " outside " << family;
    if (brace != std::string::npos) {
      for (const std::string& label : LabelNames(series.substr(brace))) {
        scrape.families[family].labels.insert(label);
      }
    }
    EXPECT_TRUE(scrape.samples.emplace(series, std::stod(line.substr(space + 1))).second)
        << "twice: " << series;
  }
  return scrape;
}

// The table of docs/metrics.md, in the shape of a scrape.
std::map<std::string, Scrape::Family> Documented() {
  std::ifstream in(ZEROD_METRICS_DOC);
  EXPECT_TRUE(in.good()) << ZEROD_METRICS_DOC;
  std::map<std::string, Scrape::Family> documented;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("| `", 0) != 0) continue;
    std::vector<std::string> cells;
    std::istringstream row(line);
    for (std::string cell; std::getline(row, cell, '|');) {
      const size_t begin = cell.find_first_not_of(" `");
      const size_t end = cell.find_last_not_of(" `");
      cells.push_back(begin == std::string::npos ? "" : cell.substr(begin, end - begin + 1));
    }
    EXPECT_GE(cells.size(), 6u) << line;
    Scrape::Family& family = documented[cells[1]];
    family.type = cells[2];
    std::istringstream labels(cells[3]);
    for (std::string label; std::getline(labels, label, ',');) {
      family.labels.insert(label.substr(label.find_first_not_of(' ')));
    }
  }
  return documented;
}

void CountEverything(JobMetrics* job) {
  for (Latency l : {Latency::kGather, Latency::kScatter, Latency::kStep, Latency::kApply,
                    Latency::kReduce, Latency::kPut, Latency::kRead}) {
    job->Observe(l, 0.003);
  }
  for (Traffic t : {Traffic::kGatheredToWindow, Traffic::kScatteredFromClient,
                    Traffic::kSentToMembers, Traffic::kReceivedFromMembers,
                    Traffic::kCopiedToTransfer, Traffic::kCopiedFromTransfer,
                    Traffic::kSetAside}) {
    job->Add(t, 1000);
  }
  for (const char* kind : {"parameters", "window", "something new"}) job->SetMemory(kind, 7);
  for (const char* what : {"gather", "step", "scalar"}) job->SetWaiting(what, 2);
  job->SetClients(3);
  job->SetStep(10, 9, 2);
  job->CountWindowGrowth(65536);
  job->CountClientDeath();
}

TEST(Metrics, EndpointServesWhatTheDocumentSays) {
  auto metrics = Metrics::Create("127.0.0.1:0");
  ASSERT_TRUE(metrics.ok()) << metrics.status();
  EXPECT_THAT((*metrics)->address(), testing::StartsWith("127.0.0.1:"));
  EXPECT_NE((*metrics)->address(), "127.0.0.1:0");
  auto job = (*metrics)->ForJob("a");
  CountEverything(job.get());
  HttpGet((*metrics)->address());  // the exposer's own metrics count from the second scrape on
  const Scrape scrape = Parse(HttpGet((*metrics)->address()));
  const auto documented = Documented();
  for (const auto& [name, family] : scrape.families) {
    ASSERT_EQ(documented.count(name), 1u) << name << " is served but not in docs/metrics.md";
    EXPECT_EQ(documented.at(name).type, family.type) << name;
    EXPECT_EQ(documented.at(name).labels, family.labels) << name;
  }
  for (const auto& [name, family] : documented) {
    EXPECT_EQ(scrape.families.count(name), 1u) << name << " is in docs/metrics.md, not served";
  }
}

TEST(Metrics, ValuesArriveUnderTheirNames) {
  auto metrics = Metrics::Create("");
  ASSERT_TRUE(metrics.ok());
  EXPECT_EQ((*metrics)->address(), "");
  auto job = (*metrics)->ForJob("a");
  CountEverything(job.get());
  const auto samples = Parse((*metrics)->Text()).samples;
  const auto value = [&](const std::string& series) {
    const auto it = samples.find(series);
    return it == samples.end() ? -1.0 : it->second;
  };
  EXPECT_EQ(value("zerod_jobs"), 1);
  EXPECT_EQ(value("zerod_clients{job=\"a\"}"), 3);
  EXPECT_EQ(value("zerod_committed_step{job=\"a\"}"), 10);
  EXPECT_EQ(value("zerod_applied_steps{job=\"a\"}"), 9);
  EXPECT_EQ(value("zerod_generation{job=\"a\"}"), 2);
  EXPECT_EQ(value("zerod_memory_bytes{job=\"a\",kind=\"window\"}"), 7);
  EXPECT_EQ(value("zerod_memory_bytes{job=\"a\",kind=\"other\"}"), 7);
  EXPECT_EQ(value("zerod_memory_bytes{job=\"a\",kind=\"moments\"}"), 0);
  EXPECT_EQ(value("zerod_waiting_requests{job=\"a\",what=\"scalar\"}"), 2);
  EXPECT_EQ(value("zerod_sent_bytes_total{job=\"a\"}"), 1000);
  EXPECT_EQ(value("zerod_window_growth_bytes_total{job=\"a\"}"), 65536);
  EXPECT_EQ(value("zerod_gather_seconds_count{job=\"a\"}"), 1);
  EXPECT_EQ(value("zerod_gather_seconds_bucket{job=\"a\",le=\"0.0025\"}"), 0);
  EXPECT_EQ(value("zerod_gather_seconds_bucket{job=\"a\",le=\"0.005\"}"), 1);
  EXPECT_GT(value("process_resident_memory_bytes"), 1e6);
  EXPECT_GT(value("process_open_fds"), 2);
}

TEST(Metrics, SeriesGoWithTheirJob) {
  auto metrics = Metrics::Create("");
  ASSERT_TRUE(metrics.ok());
  const size_t baseline = Parse((*metrics)->Text()).samples.size();
  for (int i = 0; i < 50; ++i) {
    auto job = (*metrics)->ForJob("job-" + std::to_string(i % 7));
    CountEverything(job.get());
    const size_t with_job = Parse((*metrics)->Text()).samples.size();
    EXPECT_GT(with_job, baseline);
    EXPECT_LE(with_job - baseline, 200u) << "more series than docs/metrics.md promises";
  }
  const Scrape after = Parse((*metrics)->Text());
  EXPECT_EQ(after.samples.size(), baseline);
  EXPECT_EQ(after.samples.at("zerod_jobs"), 0);
}

TEST(Metrics, SuccessorOfTheSameNameKeepsItsSeries) {
  auto metrics = Metrics::Create("");
  ASSERT_TRUE(metrics.ok());
  auto old = (*metrics)->ForJob("a");
  auto successor = (*metrics)->ForJob("a");
  old.reset();
  successor->SetClients(5);
  EXPECT_EQ(Parse((*metrics)->Text()).samples.at("zerod_clients{job=\"a\"}"), 5);
}

TEST(Metrics, JobsComeAndGoWhileOthersScrape) {
  auto metrics = Metrics::Create("");
  ASSERT_TRUE(metrics.ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) CountEverything((*metrics)->ForJob("same").get());
    });
  }
  for (int i = 0; i < 20; ++i) Parse((*metrics)->Text());
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(Parse((*metrics)->Text()).samples.at("zerod_jobs"), 0);
}

TEST(Metrics, BadAddressesAreErrors) {
  for (const char* listen : {"9470", ":9470", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"}) {
    const auto metrics = Metrics::Create(listen);
    EXPECT_EQ(metrics.status().code(), absl::StatusCode::kInvalidArgument) << listen;
    EXPECT_THAT(std::string(metrics.status().message()), testing::HasSubstr("HOST:PORT"));
  }
  auto first = Metrics::Create("127.0.0.1:0");
  ASSERT_TRUE(first.ok());
  const auto second = Metrics::Create((*first)->address());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable) << second.status();
}

}  // namespace
}  // namespace zerod::metrics
