/* generate.c - reads token ids through a bundle and continues them greedily.
 *
 *   cc -std=c11 generate.c $(pkg-config --cflags --libs lococo) -o generate
 *   LOCOCO_ONNXRUNTIME=/path/to/libonnxruntime.so ./generate bundle/ 16 1 450 7483
 */
#include "common.h"

static void print_log(lococo_log_level level, const char* message, void* user) {
  (void)user;
  if (level >= LOCOCO_LOG_WARNING) fprintf(stderr, "%s\n", message);
}

static int print_token(int32_t token_id, void* user) {
  (void)user;
  printf(" %" PRId32, token_id);
  fflush(stdout);
  return 0; /* go on */
}

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s BUNDLE NUM_TOKENS ID [ID ...]\n", argv[0]);
    return 2;
  }
  check_abi();
  const size_t n = (size_t)(argc - 3);
  int32_t* ids = malloc(n * sizeof *ids);
  if (ids == NULL) return 1;
  for (size_t i = 0; i < n; ++i) ids[i] = (int32_t)strtol(argv[3 + i], NULL, 10);

  lococo_set_log_callback(print_log, NULL);
  lococo_model* model = open_model(argv[1]);
  lococo_session* session = NULL;
  check(lococo_session_create(model, &session));
  check(lococo_session_prefill(session, ids, n, NULL));
  free(ids);

  printf("tokens");
  check(lococo_session_generate(session, NULL, (int32_t)strtol(argv[2], NULL, 10), print_token, NULL, NULL));

  int64_t position = 0;
  int32_t live_slots = 0;
  size_t state_size = 0;
  check(lococo_session_position(session, &position));
  check(lococo_session_live_slots(session, &live_slots));
  check(lococo_session_state_size(session, &state_size));
  printf("\nposition %" PRId64 "\nlive slots %" PRId32 "\nstate bytes %zu\n", position, live_slots, state_size);

  lococo_session_destroy(session);
  lococo_model_close(model);
  return 0;
}
