#include "isolated.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

namespace zigzag::cli {
namespace {

[[noreturn]] void child(int descriptor, const std::function<std::string()>& work,
                        unsigned seconds) {
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGALRM}) std::signal(number, SIG_DFL);
  ::alarm(seconds);
  std::string text = "1";
  try {
    text += work();
  } catch (const std::exception& error) {
    text = std::string("0") + error.what();
  } catch (...) {
    text = "0an unknown failure";
  }
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t written = ::write(descriptor, text.data() + done, text.size() - done);
    if (written <= 0) break;
    done += static_cast<std::size_t>(written);
  }
  // Without exit handlers: threads of the libraries may still run.
  ::_exit(0);
}

}  // namespace

Isolated run_isolated(const std::function<std::string()>& work, unsigned seconds) {
  std::array<int, 2> ends{};
  if (::pipe(ends.data()) != 0) return {false, std::strerror(errno)};
  std::fflush(stdout);
  const pid_t process = ::fork();
  if (process < 0) return {false, std::strerror(errno)};
  if (process == 0) {
    ::close(ends[0]);
    child(ends[1], work, seconds);
  }
  ::close(ends[1]);
  std::string text;
  std::array<char, 4096> piece{};
  while (true) {
    const ssize_t got = ::read(ends[0], piece.data(), piece.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    text.append(piece.data(), static_cast<std::size_t>(got));
  }
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(process, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFSIGNALED(status)) {
    const int number = WTERMSIG(status);
    return {false, number == SIGALRM ? fmt::format("no answer within {} s", seconds)
                                     : fmt::format("crashed: {}", ::strsignal(number))};
  }
  if (text.empty()) return {false, "ended without an answer"};
  return {text.front() == '1', text.substr(1)};
}

}  // namespace zigzag::cli
