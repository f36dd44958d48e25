/* memory_pack.c - reads a document once, and starts any number of sessions from what was kept of it.
 *
 *   ./memory_pack save bundle/ book.lococo < document_ids    one file, as large after 3 tokens as after 3 million
 *   ./memory_pack ask bundle/ book.lococo 32 < question_ids  one question a line, each to a session of its own
 */
#include <string.h>

#include "common.h"

static int print_token(int32_t token_id, void* user) {
  (void)user;
  printf(" %" PRId32, token_id);
  return 0; /* go on */
}

static void save(lococo_session* session, const char* path) {
  id_list document = read_ids(1);
  check(lococo_session_prefill(session, document.ids, document.n, NULL));
  free(document.ids);
  check(lococo_session_save(session, path));
  size_t size = 0;
  check(lococo_session_state_size(session, &size));
  printf("%zu tokens, %zu bytes\n", document.n, size);
}

static void ask(lococo_session* pack, const char* path, int32_t max_tokens) {
  check(lococo_session_load(pack, path));
  for (id_list question = read_ids(0); question.n > 0; question = read_ids(0)) {
    lococo_session* session = NULL;
    check(lococo_session_clone(pack, &session));
    check(lococo_session_prefill(session, question.ids, question.n, NULL));
    free(question.ids);
    printf("answer");
    check(lococo_session_generate(session, NULL, max_tokens, print_token, NULL, NULL));
    printf("\n");
    lococo_session_destroy(session);
  }
}

int main(int argc, char** argv) {
  const int saves = argc == 4 && strcmp(argv[1], "save") == 0;
  if (!saves && !(argc == 5 && strcmp(argv[1], "ask") == 0)) {
    fprintf(stderr, "usage: %s save BUNDLE PACK, or %s ask BUNDLE PACK MAX_TOKENS\n", argv[0], argv[0]);
    return 2;
  }
  check_abi();
  lococo_model* model = open_model(argv[2]);
  lococo_session* session = NULL;
  check(lococo_session_create(model, &session));
  if (saves) {
    save(session, argv[3]);
  } else {
    ask(session, argv[3], (int32_t)strtol(argv[4], NULL, 10));
  }
  lococo_session_destroy(session);
  lococo_model_close(model);
  return 0;
}
