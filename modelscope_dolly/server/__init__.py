"""`dolly serve`: the OpenAI API and ModelScope's shapes over HTTP, for one model on one machine."""
