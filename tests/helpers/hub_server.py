"""A stand-in for the Hugging Face hub on this machine, with what a push and a download call."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import yaml

TOKEN, OWNER = "hf_token", "somebody"


class Hub(ThreadingHTTPServer):
    """Repositories by name: a list of commits, each with the contents of all files by path."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories, self.private, self.objects, self.calls = {}, {}, {}, []
        self.full = False
        """Whether large files are refused."""

    def environment(self, folder):
        """Returns environment variables with which programs use this hub and an empty cache."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",  # Its server speaks a protocol of its own.
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }


@contextlib.contextmanager
def served():
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def oid(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def metadata_errors(text):
    """Returns what the hub requires of a model card's metadata and this one lacks."""
    metadata = yaml.safe_load(text.split("---\n")[1])
    errors = [] if isinstance(metadata.get("license"), str) else ["license"]
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            whole = {"type", "name"} <= result["dataset"].keys() and "type" in result["task"]
            values = [metric["value"] for metric in result["metrics"] if metric["type"]]
            if not (model["name"] and whole and values and all(0 <= x <= 1 for x in values)):
                errors.append("model-index")
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        hub, path = self.server, urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.calls.append(f"{self.command} {path}")
        if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
        for pattern, answer in ROUTES.items():
            method, _, expected = pattern.partition(" ")
            found = re.fullmatch(expected, path)
            if found and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                names = found.groupdict()
                repository = names.get("repository")
                if repository is None or repository in hub.repositories:
                    return answer(self, hub, body, **names)
        return self.reply({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one


def whoami(self, hub, body):
    self.reply({"name": OWNER, "type": "user", "orgs": []})


def create(self, hub, body):
    given = json.loads(body)
    name = f"{given['organization']}/{given['name']}"
    if given["organization"] != OWNER:
        return self.reply({"error": f"no right to write to {name}"}, 403)
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, [{}])
    hub.private.setdefault(name, given.get("visibility") == "private" or given.get("private"))
    return self.reply({"url": f"{hub.endpoint}/{name}"}, status)


def validate(self, hub, body):
    errors = metadata_errors(json.loads(body)["content"])
    described = [{"message": error} for error in errors]
    self.reply({"errors": described, "warnings": []}, 400 if errors else 200)


def preupload(self, hub, body, repository):
    files = [
        {
            "path": file["path"],
            "uploadMode": "regular" if file["path"].endswith((".md", ".json")) else "lfs",
            "shouldIgnore": False,
        }
        for file in json.loads(body)["files"]
    ]
    self.reply({"files": files})


def batch(self, hub, body, repository):
    upload = f"{hub.endpoint}/objects"
    objects = [
        one | {"actions": {"upload": {"href": f"{upload}/{one['oid']}"}}}
        for one in json.loads(body)["objects"]
    ]
    self.reply({"transfer": "basic", "objects": objects})


def put(self, hub, body, digest):
    if hub.full:
        return self.reply({"error": "no space"}, 413)
    assert hashlib.sha256(body).hexdigest() == digest
    hub.objects[digest] = body
    return self.reply(b"")


def commit(self, hub, body, repository):
    files = dict(hub.repositories[repository][-1])
    for line in body.splitlines():
        change = json.loads(line)
        value = change["value"]
        if change["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif change["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
    hub.repositories[repository].append(files)
    url = f"{hub.endpoint}/{repository}/commit/{oid(files)}"
    self.reply({"commitUrl": url, "commitOid": oid(files), "success": True})


def at(hub, repository, revision):
    """Returns the files of a revision; None if there is no such one."""
    commits = hub.repositories[repository]
    return (
        {oid(files): files for files in commits}.get(revision)
        if revision != "main"
        else (commits[-1])
    )


def info(self, hub, body, repository, revision="main"):
    files = at(hub, repository, revision)
    if files is None:
        return self.reply({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
    return self.reply({"id": repository, "sha": oid(files), "private": False})


def tree(self, hub, body, repository, revision):
    files = at(hub, repository, revision)
    self.reply(
        [
            {"type": "file", "path": path, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
            for path, x in files.items()
        ]
    )


def resolve(self, hub, body, repository, revision, path):
    files = at(hub, repository, revision)
    if path not in files:
        return self.reply({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
    etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
    return self.reply(files[path], ETag=etag, X_Repo_Commit=oid(files))


_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
ROUTES = {
    "GET /api/whoami-v2": whoami,
    "POST /api/repos/create": create,
    "POST /api/validate-yaml": validate,
    f"POST /api/models/{_REPOSITORY}/preupload/main": preupload,
    f"POST /api/models/{_REPOSITORY}/commit/main": commit,
    f"POST /{_REPOSITORY}.git/info/lfs/objects/batch": batch,
    "PUT /objects/(?P<digest>.*)": put,
    f"GET /api/models/{_REPOSITORY}": info,
    f"GET /api/models/{_REPOSITORY}/revision/(?P<revision>[^/]+)": info,
    f"GET /api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)": tree,
    f"GET /{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": resolve,
}
