/* two_sessions.c - two sequences in two threads on one set of weights: ./two_sessions bundle/ NUM_TOKENS ID ID
 *
 * The model is shared; a session belongs to one thread at a time.
 */
#include <pthread.h>

#include "common.h"

typedef struct task {
  lococo_model* model;
  int32_t prompt;
  int32_t num_tokens;
  int32_t* ids; /* (num_tokens) */
  int32_t n;    /* generated so far */
} task;

static int keep_token(int32_t token_id, void* user) {
  task* t = user;
  t->ids[t->n++] = token_id;
  return 0; /* go on */
}

static void* run(void* argument) {
  task* t = argument;
  lococo_session* session = NULL;
  check(lococo_session_create(t->model, &session));
  check(lococo_session_step(session, t->prompt));
  check(lococo_session_generate(session, NULL, t->num_tokens, keep_token, t, NULL));
  lococo_session_destroy(session);
  return NULL;
}

int main(int argc, char** argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s BUNDLE NUM_TOKENS ID ID\n", argv[0]);
    return 2;
  }
  check_abi();
  const int32_t num_tokens = (int32_t)strtol(argv[2], NULL, 10);
  lococo_model* model = open_model(argv[1]);

  task tasks[2];
  pthread_t threads[2];
  for (int i = 0; i < 2; ++i) {
    const int32_t prompt = (int32_t)strtol(argv[3 + i], NULL, 10);
    tasks[i] = (task){model, prompt, num_tokens, calloc((size_t)num_tokens + 1, sizeof(int32_t)), 0};
    if (tasks[i].ids == NULL || pthread_create(&threads[i], NULL, run, &tasks[i]) != 0) return 1;
  }
  for (int i = 0; i < 2; ++i) {
    pthread_join(threads[i], NULL);
    printf("tokens");
    for (int32_t k = 0; k < tasks[i].n; ++k) printf(" %" PRId32, tasks[i].ids[k]);
    printf("\n");
    free(tasks[i].ids);
  }
  lococo_model_close(model);
  return 0;
}
