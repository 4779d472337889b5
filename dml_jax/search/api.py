"""The JSON route of the server, and its description in OpenAPI 3.1."""

import json
from collections.abc import Sequence

import dml_jax
from dml_jax.search import html
from dml_jax.search.gallery import Neighbour

PATH = "/api/search"
DESCRIPTION_PATH = "/openapi.json"


def answer(neighbours: Sequence[Neighbour], threshold: float | None) -> bytes:
    """Returns the neighbours of an image as JSON, as `DESCRIPTION` says.

    Args:
        neighbours: the neighbours, the nearest first.
        threshold: the similarity below which a neighbour is unknown; None if there is none.
    """
    found = [
        {
            "image": neighbour.row,
            "name": neighbour.name,
            "class": neighbour.class_name,
            "similarity": neighbour.similarity,
            "known": threshold is None or neighbour.similarity >= threshold,
        }
        for neighbour in neighbours
    ]
    return json.dumps({"threshold": threshold, "neighbours": found}).encode()


def _answer_of(description: str, schema: dict) -> dict:
    return {"description": description, "content": schema}


_JPEG: dict = {"image/jpeg": {}}
_MESSAGE = {"text/plain": {"schema": {"type": "string"}}}
_ROW = {"name": "image", "in": "path", "required": True, "schema": {"type": "integer"}}
_NEIGHBOUR = {
    "type": "object",
    "required": ["image", "name", "class", "similarity", "known"],
    "properties": {
        "image": {"type": "integer", "description": "Number in the gallery, for /image and so on."},
        "name": {"type": "string", "description": "File below the folder that was indexed."},
        "class": {"type": "string", "description": "Its class; `unknown` below the threshold."},
        "similarity": {"type": "number", "description": "Cosine similarity to the query."},
        "known": {"type": "boolean", "description": "Whether it reaches the threshold, if any."},
    },
}
_NEIGHBOURS = {
    "type": "object",
    "required": ["threshold", "neighbours"],
    "properties": {
        "threshold": {"type": ["number", "null"], "description": "Least similarity of one class."},
        "neighbours": {"type": "array", "items": {"$ref": "#/components/schemas/Neighbour"}},
    },
}

DESCRIPTION = json.dumps(
    {
        "openapi": "3.1.0",
        "info": {"title": "dml-jax search", "version": dml_jax.__version__},
        "paths": {
            PATH: {
                "post": {
                    "summary": "Returns the images of the gallery nearest to an image.",
                    "requestBody": {
                        "required": True,
                        "description": "An encoded image of up to "
                        f"{html.MAX_UPLOAD_BYTES >> 20} MB.",
                        "content": {"image/*": {}},
                    },
                    "responses": {
                        "200": _answer_of(
                            "The neighbours, the nearest first.",
                            {"application/json": {"schema": _NEIGHBOURS}},
                        ),
                        "400": _answer_of("The body is shorter than it should be.", _MESSAGE),
                        "411": _answer_of("The request has no Content-Length.", _MESSAGE),
                        "413": _answer_of("The image is too large.", _MESSAGE),
                        "415": _answer_of("The body is no image that can be read.", _MESSAGE),
                    },
                }
            },
            **{
                f"/{name}/{{image}}": {
                    "get": {
                        "summary": f"Returns {what} of an image of the gallery.",
                        "parameters": [_ROW],
                        "responses": {
                            "200": _answer_of("The image.", _JPEG),
                            "404": _answer_of("There is no such image.", _MESSAGE),
                        },
                    }
                }
                for name, what in (("thumbnail", "a small copy"), ("image", "a large copy"))
            },
        },
        "components": {"schemas": {"Neighbour": _NEIGHBOUR}},
    },
    indent=2,
).encode()
"""The document at `DESCRIPTION_PATH`."""
