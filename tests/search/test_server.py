import contextlib
import http.client
import io
import json
import re
import threading

import jsonschema
import numpy as np
import pytest
from PIL import Image

from dml_jax import data
from dml_jax.evaluation.embedding_files import Embeddings
from dml_jax.search import api, html, index, server
from dml_jax.search.gallery import search as search_gallery
from tests.helpers import chromium


def png(colour, size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def colour_of(image, name="image"):
    """Embeds an image as its mean colour."""
    return data.decode(image, name).mean((0, 1), dtype=np.float32)[None]


COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue <b>": (5, 5, 250)}


def make_gallery(folder):
    names = [f"{name}/{name}.png" for name in COLOURS]
    for name, colour in zip(names, COLOURS.values(), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(png(colour))
    (folder / "secret.txt").write_text("secret")
    names.append("secret.txt")  # In the index, but not an image.
    vectors = np.array([*COLOURS.values(), (100, 100, 100)], np.float32)
    images = Embeddings(vectors, np.arange(4), tuple(names), (*COLOURS, "grey"))
    return index.build(images, folder=str(folder))[0]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return make_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def port(gallery):
    running = server.make_server(gallery, colour_of, host="127.0.0.1", port=0, neighbours=3)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running.server_address[1]
    running.shutdown()
    thread.join()
    running.server_close()


def request(port, method, path, body=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response, response.read()


def search(port, image, **headers):
    return request(port, "POST", "/search", image, **{"Content_Type": "image/png"} | headers)


def test_page_allows_only_its_own_script(port):
    response, content = request(port, "GET", "/")
    assert response.status == 200
    assert "4 images, flat index (exact)" in content.decode()
    policy = response.headers["Content-Security-Policy"]
    assert f"script-src 'sha256-{html.SCRIPT_HASH}'" in policy
    assert "default-src 'none'" in policy
    (script,) = re.findall("<script>(.*?)</script>", content.decode(), re.DOTALL)
    assert script == html.SCRIPT
    assert "Python" not in response.headers["Server"]


def test_image_query_returns_its_neighbours(port):
    response, content = search(port, png((20, 30, 240)))
    assert response.status == 200
    shown = content.decode()
    assert re.findall('src="([^"]*)"', shown) == ["/thumbnail/2", "/thumbnail/3", "/thumbnail/1"]
    assert "blue &lt;b&gt;" in shown and "blue <b>/" not in shown
    response, image = request(port, "GET", "/thumbnail/2")
    assert (response.status, response.headers["Content-Type"]) == (200, "image/jpeg")
    assert colour_of(image)[0].argmax() == 2
    assert request(port, "GET", "/image/2")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/red/red.png",
        "/thumbnail/secret.txt",
        "/thumbnail/3",  # It is in the index, but not an image.
        "/thumbnail/4",
        "/thumbnail/-1",
        "/thumbnail/01",
        "/thumbnail/0/../secret.txt",
        "/thumbnail/99999999999999999999",
        "/image/../../../../etc/passwd",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "//etc/passwd",
        "/?",
        "/thumbnail/0?",
    ],
)
def test_no_other_file_is_served(port, path):
    response, content = request(port, "GET", path)
    assert (response.status, content) == (404, b"there is no such page")


def test_other_paths_accept_no_images(port):
    assert request(port, "POST", "/", png("red"), Content_Type="image/png")[0].status == 404
    assert request(port, "PUT", "/search", png("red"))[0].status == 501


@pytest.mark.parametrize("kind", ["text/plain", "application/octet-stream", ""])
def test_other_content_types_are_rejected(port, kind):
    response, content = search(port, png("red"), Content_Type=kind)
    assert (response.status, content) == (415, b"only images are accepted")


@pytest.mark.parametrize("image", [b"", b"%!PS-Adobe-3.0 EPSF-3.0", png("red", 64)[:60]])
def test_upload_that_is_not_an_image_is_rejected(port, image):
    response, content = search(port, image)
    assert response.status == 415
    assert b"image" in content
    assert search(port, png("red"))[0].status == 200  # The server still works.


def test_upload_is_rejected_by_its_declared_size(port):
    response, content = search(port, b"", Content_Length=str(html.MAX_UPLOAD_BYTES + 1))
    assert (response.status, content) == (413, b"images of up to 20 MB are accepted")
    assert response.headers["Connection"] == "close"
    for length in ("-1", "1e3", "x"):
        assert search(port, b"", Content_Length=length)[0].status == 411
    # The response to a chunked request comes before its first chunk.
    assert search(port, b"", Transfer_Encoding="chunked")[0].status == 411


@pytest.mark.parametrize(
    "host, status", [("localhost:9", 200), ("[::1]", 200), ("evil.example:80", 403), ("", 403)]
)
def test_other_host_names_are_rejected(port, host, status):
    assert request(port, "GET", "/", Host=host)[0].status == status


def test_port_in_use_is_named_in_the_error(port, gallery):
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}"):
        server.make_server(gallery, colour_of, host="127.0.0.1", port=port, neighbours=3)


def test_json_route_answers_as_its_description_says(port):
    response, content = request(
        port, "POST", "/api/search", png((20, 30, 240)), Content_Type="image/png"
    )
    assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
    answer = json.loads(content)
    assert [x["image"] for x in answer["neighbours"]] == [2, 3, 1]
    first = answer["neighbours"][0]
    assert (first["name"], first["class"], first["known"]) == (
        "blue <b>/blue <b>.png",
        "blue <b>",
        True,
    )
    response, content = request(port, "GET", "/openapi.json")
    assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
    described = json.loads(content)
    operation = described["paths"]["/api/search"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    schema = {**schema, "components": described["components"]}  # The references are to here.
    jsonschema.validate(answer, schema)
    for wrong in ({"neighbours": []}, answer | {"neighbours": [first | {"known": "yes"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    for body, headers, status in (
        (b"no image", {"Content_Type": "image/png"}, "415"),
        (png("red"), {"Content_Type": "text/plain"}, "415"),
        (b"", {"Content_Type": "image/png", "Content_Length": "x"}, "411"),
        (b"", {"Content_Type": "image/png", "Content_Length": str(1 << 40)}, "413"),
    ):
        response, content = request(port, "POST", "/api/search", body, **headers)
        assert str(response.status) == status and status in operation["responses"]
    for path in set(described["paths"]) - {"/api/search"}:
        assert request(port, "GET", path.replace("{image}", "0"))[0].status == 200
        assert request(port, "GET", path.replace("{image}", "3"))[0].status == 404


def test_openapi_document_has_the_fields_that_the_specification_requires():
    described = json.loads(api.DESCRIPTION)
    assert described["openapi"].startswith("3.1.") and {"title", "version"} <= set(
        described["info"]
    )
    for path, item in described["paths"].items():
        for method, operation in item.items():
            assert method in ("get", "post")
            parameters = {x["name"]: x for x in operation.get("parameters", [])}
            assert set(parameters) == set(re.findall(r"{(.*?)}", path))
            assert all(x["in"] == "path" and x["required"] for x in parameters.values())
            for status, answer in operation["responses"].items():
                assert re.fullmatch("[1-5][0-9]{2}", status) and answer["description"]
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_results_below_the_threshold_are_unknown(gallery):
    query = np.array([[20.0, 30.0, 240.0]], np.float32)
    known, *rest = search_gallery(gallery, query, 4, threshold=0.9)
    assert known.class_name == "blue <b>" and known.similarity > 0.9
    assert {x.class_name for x in rest} == {"unknown"} and max(x.similarity for x in rest) < 0.9
    shown = html.results([known, *rest])
    assert "unknown <b>×3</b>" in shown
    plain = gallery.nearest(query, 4)
    assert search_gallery(gallery, query, 4) == plain
    assert [x[:2] for x in [known, *rest]] == [x[:2] for x in plain]
    exactly = plain[1].similarity
    assert search_gallery(gallery, query, 4, threshold=exactly)[1].class_name == "grey"


def test_contact_sheet_is_self_contained(gallery):
    image = png((20, 30, 240))
    found = gallery.nearest(colour_of(image), 3)
    page = html.sheet(gallery, [("que<ry>.png", image, found)])
    sources = re.findall('src="([^"]*)"', page)
    assert len(sources) == 3  # The query and two of three neighbours; the last is not an image.
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert page.count("no picture") == 1
    assert "que&lt;ry&gt;.png" in page and "<ry>" not in page
    assert "http" not in page and "<script" not in page


DROP = """
(async () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 8;
  const brush = canvas.getContext("2d");
  brush.fillStyle = "rgb(250, 5, 5)";
  brush.fillRect(0, 0, 8, 8);
  const dataTransfer = new DataTransfer();
  const image = await new Promise(done => canvas.toBlob(done, "image/png"));
  dataTransfer.items.add(new File([image], "dropped.png", {type: "image/png"}));
  document.dispatchEvent(new DragEvent("drop", {dataTransfer, cancelable: true}));
})()
"""


@chromium.needed
@pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)])
def test_image_dropped_on_the_page(port, tmp_path, width, touch):
    with chromium.Page(tmp_path / "profile", width=width, touch=touch) as browser:
        browser.open(f"http://127.0.0.1:{port}/", ready="document.readyState === 'complete'")
        browser.get(DROP)
        browser.until("document.querySelectorAll('.similarity').length === 3")
        assert browser.get("document.querySelector('ol li b').textContent") == "red"
        pictures = "[...document.querySelectorAll('ol img')]"
        browser.until(f"{pictures}.every(x => x.complete)")
        assert browser.get(f"{pictures}.filter(x => x.naturalWidth > 0).length") == 2
        assert browser.get("document.documentElement.scrollWidth") <= width
        (problem,) = browser.problems
        assert "404" in problem  # The third neighbour is not an image.
