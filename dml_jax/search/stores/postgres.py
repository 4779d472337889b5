"""PostgreSQL with the extension pgvector. Without an index that the user adds it is exact."""

import contextlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from dml_jax._utils import extras
from dml_jax._utils.errors import UserError
from dml_jax.search.gallery import Neighbour
from dml_jax.search.stores.base import Batch, Facts

with extras.required_by("pgvector"):
    import pgvector.psycopg
    import psycopg
    from psycopg import sql


class PostgresStore:
    """A table of PostgreSQL; its comment has the facts."""

    kind = "PostgreSQL"

    def __init__(self, url: str, table: str) -> None:
        """Connects to a database; passwords come from the URL, PGPASSWORD or ~/.pgpass.

        Raises:
            OSError: the database cannot be reached.
            ValueError: the extension pgvector is not installed on the server.
        """
        with _reachable():
            self._connection = psycopg.connect(url, autocommit=True)
        self._table = table
        try:
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            pgvector.psycopg.register_vector(self._connection)
        except psycopg.Error as error:
            self._connection.close()
            raise UserError(f"PostgreSQL has no extension pgvector: {error}") from error

    def write(self, dim: int, batches: Iterator[Batch], facts: Facts) -> None:
        """Creates the table in one transaction, so that it appears complete."""
        columns = "(row bigint PRIMARY KEY, name text, class text, vector vector({}))"
        try:
            with _reachable(), self._connection.transaction():
                self._run(f"CREATE TABLE {{}} {columns}", sql.Literal(dim))
                copy = self._sql(
                    "COPY {} (row, name, class, vector) FROM STDIN WITH (FORMAT BINARY)"
                )
                with self._connection.cursor().copy(copy) as writing:
                    writing.set_types(["int8", "text", "text", "vector"])
                    for batch in batches:
                        for row in zip(batch.rows.tolist(), *batch[1:], strict=True):
                            writing.write_row(row)
                self._run("COMMENT ON TABLE {} IS {}", sql.Literal(json.dumps({"dml_jax": facts})))
        except psycopg.errors.DuplicateTable:
            raise UserError(f"the table {self._table} exists already") from None

    def facts(self) -> Facts | None:
        """Returns what `write` was given; None if there is no table of it."""
        query = "SELECT obj_description(to_regclass(quote_ident(%s)), 'pg_class')"
        with _reachable():
            ((comment,),) = self._connection.execute(query, (self._table,)).fetchall()
        try:
            return json.loads(comment or "{}").get("dml_jax")
        except (ValueError, AttributeError):  # Somebody else's comment.
            return None

    def search(self, unit: Float32[np.ndarray, " d"], k: int) -> list[Neighbour]:
        """Returns at most k images with the largest cosine similarity to a unit vector."""
        found = self._run(
            "SELECT row, name, class, 1 - (vector <=> %s) FROM {} ORDER BY vector <=> %s LIMIT %s",
            values=(unit, unit, k),
        )
        return [Neighbour(*row) for row in found]

    def vectors(self, rows: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Returns the unit vectors of images."""
        found = self._run("SELECT row, vector FROM {} WHERE row = ANY(%s)", values=(list(rows),))
        by_row = dict(found)
        return np.array([by_row[row].to_numpy() for row in rows], np.float32)

    def name(self, row: int) -> str | None:
        """Returns the name of an image; None if there is no such image."""
        found = self._run("SELECT name FROM {} WHERE row = %s", values=(row,))
        return found[0][0] if found else None

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def _sql(self, query: str, *parts: sql.Composable) -> sql.Composed:
        return sql.SQL(query).format(sql.Identifier(self._table), *parts)

    def _run(self, query: str, *parts: sql.Composable, values: tuple = ()) -> list[tuple]:
        """Returns the rows of a query, whose first {} is the table."""
        with _reachable():
            cursor = self._connection.execute(self._sql(query, *parts), values or None)
            return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except psycopg.OperationalError as error:
        raise OSError(f"PostgreSQL does not answer: {error}") from error
