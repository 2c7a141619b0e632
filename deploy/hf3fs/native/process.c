/* The lock of the library's tables, and what happens to them on fork(2). */
#define _GNU_SOURCE
#include "internal.h"

static pthread_mutex_t state_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

void lock_state(void) { pthread_mutex_lock(&state_lock); }

void unlock_state(void) {
  struct registered_file *released = take_released();
  pthread_mutex_unlock(&state_lock);
  close_files(released);
}

static void before_fork(void) {
  lock_state();
  engine_shared.fork_prepare();
  engine_pool.fork_prepare();
}

static void in_parent(void) {
  engine_pool.fork_parent();
  engine_shared.fork_parent();
  unlock_state();
}

static void in_child(void) {
  engine_pool.fork_child();
  engine_shared.fork_child();
  reset_rings_of_child();
  unlock_state();
}

static void install(void) { pthread_atfork(before_fork, in_parent, in_child); }

void prepare_process(void) { pthread_once(&once, install); }
