/* The last program of a cell's first process, and the pause program of pods: waits, and buries its children. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int number) {
  (void)number;
  _exit(0);
}

int main(void) {
  sigset_t children;
  int number;
  signal(SIGTERM, end);
  signal(SIGINT, end);
  sigemptyset(&children);
  sigaddset(&children, SIGCHLD);
  sigprocmask(SIG_BLOCK, &children, NULL);
  for (;;) {
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
    sigwait(&children, &number);
  }
}
