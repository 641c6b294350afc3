"""Operations on packed keys and values; `api` is the only door."""
