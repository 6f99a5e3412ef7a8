"""Who may ask, change documents and read traces: asked over real sockets, with headers as an attacker writes them."""

import json

import httpx
import pytest
from served import CASE, ScriptedScheduler, exchange, make_app, running, small_tokenizer

SEVEN = {"text": "damaged items within 7 days."}
TRACE = "/v1/traces/" + "0" * 32


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def serve(tmp_path, tokenizer):
    """Starts a server with these settings."""
    return lambda **settings: running(make_app(tmp_path, ScriptedScheduler(tokenizer), tokenizer, **settings))


@pytest.fixture(scope="module")
def local(tmp_path_factory, tokenizer):
    """A server on loopback without a token."""
    with running(make_app(tmp_path_factory.mktemp("local"), ScriptedScheduler(tokenizer), tokenizer)) as client:
        yield client


def put(client: httpx.Client, *headers: bytes, target: bytes = b"/v1/documents/P-7", version: bytes = b"1.1") -> int:
    """The status of a change of a document, with these header lines and no others."""
    return send(client, b"PUT", target, headers, json.dumps(SEVEN).encode(), version)


def send(client, method, target, headers, body=b"", version=b"1.1"):
    own = (b"Content-Type: application/json", b"Content-Length: %d" % len(body), b"Connection: close")
    head = b"\r\n".join((b"%s %s HTTP/%s" % (method, target, version), *headers, *own))
    return exchange(client.base_url.port, head + b"\r\n\r\n" + body)[0]


FOREIGN_HOSTS = [
    b"evil.example",
    b"a{b.example.com:8080",
    b"",
    b" ",
    b":8080",
    b"localhost.",
    b"localhost.evil.example",
    b"evil.localhost",
    b"127.0.0.1.evil.example",
    b"127.0.0.1:8080.evil.example",
    b"127.0.0.1@evil.example",
    b"evil.example@127.0.0.1",
    b"user:127.0.0.1@evil.example",
    b"127.0.0.1, evil.example",
    b"127.0.0.1 evil.example",
    b"127.0.0.1\tevil.example",
    b"127.0.0.1/../evil.example",
    b"127.0.0.1#.evil.example",
    b"http://127.0.0.1",
    b"127.0.0.1:",
    b"127.0.0.1:80:80",
    b"127.0.0.1:port",
    b"127.0.0.1:123456",
    b"127.1",
    b"0x7f000001",
    b"0x7f.0.0.1",
    b"2130706433",
    b"0177.0.0.1",
    b"127.0.0.01",
    b"0.0.0.0",
    b"128.0.0.1",
    b"::1",
    b"[::1",
    b"::1]",
    b"[::1%lo]",
    b"[::ffff:8.8.8.8]",
    b"[::2]",
    b"[127.0.0.1]",
    b"[v1.x]",
    b"\xff\xfe",
    b"\xef\xbc\x91\xef\xbc\x92\xef\xbc\x97.0.0.1",  # 127 in full-width digits
    b"l\xc3\xb6calhost",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_host_that_is_not_this_machines_by_name_is_refused(local, host):
    assert put(local, b"Host: " + host) == 403
    assert send(local, b"GET", TRACE.encode(), [b"Host: " + host]) == 403


@pytest.mark.parametrize(
    "host",
    [b"localhost", b"LocalHost:8080", b"127.0.0.1", b"127.0.0.1:1", b"127.8.9.1", b"[::1]", b"[::1]:8080", b"[0:0::1]"],
)
def test_every_name_of_this_machine_is_its_own_at_any_port(local, host):
    assert put(local, b"Host: " + host) == 200
    assert send(local, b"GET", TRACE.encode(), [b"Host:" + host]) == 404


def test_a_request_without_one_clear_host_is_refused(local):
    assert put(local, version=b"1.0") == 403
    assert put(local) == 400
    for first, second in ((b"127.0.0.1", b"evil.example"), (b"evil.example", b"127.0.0.1"), (b"::1", b"")):
        for version in (b"1.0", b"1.1"):
            assert put(local, b"Host: " + first, b"Host: " + second, version=version) in (400, 403)
    for target in (b"http://evil.example/v1/documents/P-7", b"//evil.example/v1/documents/P-7"):
        assert put(local, b"Host: 127.0.0.1", target=target) == 404


@pytest.mark.parametrize(
    "header",
    [
        "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port",
        "X-Forwarded-Server", "X-Forwarded-Prefix", "X-Forwarded", "Forwarded-For", "X-Real-IP", "X-Client-IP",
        "Client-IP", "CF-Connecting-IP", "CF-Connecting-IPv6", "CF-Ray", "True-Client-IP", "Fly-Client-IP",
        "X-Cluster-Client-IP", "Fastly-Client-IP", "X-Original-Forwarded-For", "X-Original-Host", "X-Original-URL",
        "X-Azure-ClientIP", "X-Azure-SocketIP", "X-Envoy-External-Address", "X-AppEngine-User-IP",
        "WL-Proxy-Client-IP", "X-ProxyUser-IP", "X-Remote-Addr", "CDN-Loop",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_what_came_through_a_proxy_does_not_come_from_here(local, header, value):
    assert local.put("/v1/documents/P-7", json=SEVEN, headers={header: value}).status_code == 403
    assert local.get(TRACE, headers={header.lower(): value}).status_code == 403
    assert local.get("/v1/documents", headers={header: value}).status_code == 200


def test_headers_of_local_programs_are_no_proxys(local):
    usual = {"User-Agent": "curl/8", "X-Request-Id": "1", "Traceparent": "00-1", "X-Description": "a", "Zip": "1"}
    assert local.put("/v1/documents/P-7", json=SEVEN, headers=usual).status_code == 200


@pytest.mark.parametrize(
    "page",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:3000"},
        {"Origin": "https://localhost:8080"},
        {"Origin": "http://127.0.0.1:8080"},
        {"Origin": "http://localhost:8080.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_origin_administers_nothing(local, page):
    headers = {"Host": "localhost:8080", **page}
    assert local.put("/v1/documents/P-7", json=SEVEN, headers=headers).status_code == 403
    assert local.get(TRACE, headers=headers).status_code == 403
    for move in ("/v1/rollback", "/v1/versions/1/promote"):  # no browser asks before it sends these
        assert local.post(move, headers=headers).status_code == 403


def test_the_servers_own_page_administers(local):
    headers = {"Host": "localhost:8080", "Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin"}
    assert local.put("/v1/documents/P-7", json=SEVEN, headers=headers).status_code == 200
    typed = {"Host": "localhost:8080", "Sec-Fetch-Site": "none"}
    assert local.get(TRACE, headers=typed).status_code == 404


def test_a_page_whose_name_was_pointed_here_reads_nothing_of_a_server_without_a_token(local):
    for path in (
        "/",
        "/health",
        "/metrics",
        "/v1/documents",
        "/v1/documents/P-7",
        "/v1/models",
        "/openapi.json",
        "/no",
    ):
        refused = local.get(path, headers={"Host": "evil.example:8080"})
        assert refused.status_code == 403
        assert "TWINLOOP_ADMIN_TOKEN" in refused.json()["error"]["message"]
    for path in ("/v1/decisions", "/v1/chat/completions"):
        assert local.post(path, json=CASE, headers={"Host": "evil.example:8080"}).status_code == 403
    assert 'twinloop_requests_total{route="none",status="403"}' in local.get("/metrics").text


@pytest.mark.parametrize("settings", [{"admin_token": "s3cret"}, {"local_admin": False}])
def test_a_server_with_a_token_or_open_to_the_network_answers_by_every_name(serve, settings):
    with serve(**settings) as client:
        headers = {"Host": "returns.example.com", "X-Forwarded-For": "192.0.2.1", "Origin": "https://shop.example.com"}
        assert client.get("/health", headers=headers).status_code == 200
        assert client.post("/v1/decisions", json=CASE, headers=headers).status_code == 200
        assert client.put("/v1/documents/P-7", json=SEVEN, headers=headers).status_code in (401, 403)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (b"Bearer s3cret", 200),
        (b"bearer s3cret", 200),
        (b"BEARER   s3cret", 200),
        (b"s3cret", 401),
        (b"Bearer", 401),
        (b"Bearers3cret", 401),
        (b"Basic s3cret", 401),
        (b"Bearer Bearer s3cret", 401),
        (b"Bearer s3cret s3cret", 401),
        (b"Bearer s3cre", 401),
        (b"Bearer \xff", 401),
        (b"", 401),
        (b"Bearer s3cret\r\nAuthorization: Bearer wrong", 401),
    ],
)
def test_the_scheme_of_the_token_may_be_in_any_case_and_must_be_there(serve, given, status):
    with serve(admin_token="s3cret") as client:
        assert put(client, b"Host: any.example", b"Authorization: " + given) == status


def test_every_route_that_is_not_named_as_public_needs_the_token(serve):
    public = {
        "/health": {"get"}, "/health/live": {"get"}, "/health/ready": {"get"}, "/metrics": {"get"},
        "/v1/documents": {"get"}, "/v1/documents/{document_id}": {"get"},
        "/v1/decisions": {"post"}, "/v1/chat/completions": {"post"}, "/v1/completions": {"post"},
        "/v1/classify": {"post"}, "/tokenize": {"post"}, "/detokenize": {"post"},
        "/v1/models": {"get"}, "/v1/models/{name}": {"get"},
        "/v1/versions": {"get"}, "/v1/versions/{version}": {"get"}, "/v1/load": {"get"},
    }  # fmt: skip
    with serve(admin_token="s3cret") as client:
        routes = client.get("/openapi.json").json()["paths"]
        assert set(public) <= set(routes)
        for path, methods in routes.items():
            for method in set(methods) - public.get(path, set()):
                refused = client.request(
                    method, path.format(document_id="P-7", trace_id="0" * 32, version=1), json=SEVEN
                )
                assert refused.status_code == 401, f"{method} {path}"


def test_a_token_need_not_be_ascii(serve):
    with serve(admin_token="schlüssel") as client:
        assert put(client, b"Host: any.example", "Authorization: Bearer schlüssel".encode()) == 200


def test_with_an_admin_token_only_its_bearer_changes_documents_and_reads_traces(serve):
    with serve(admin_token="s3cret") as client:
        body = {"text": "damaged items within 7 days."}
        trace = client.post("/v1/decisions", json=CASE).json()["trace_id"]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer ü".encode()}):
            assert client.put("/v1/documents/P-7", json=body, headers=headers).status_code == 401
            assert client.get(f"/v1/traces/{trace}", headers=headers).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert client.get(f"/v1/traces/{trace}", headers=right).status_code == 200
        assert client.put("/v1/documents/P-7", json=body, headers=right).status_code == 200


def test_without_a_token_only_this_machine_changes_documents(local):
    body = {"text": "damaged items within 7 days."}
    through_a_proxy = [{name: "127.0.0.1"} for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "Via")]
    for headers in ({"Host": "evil.example"}, *through_a_proxy):
        assert local.put("/v1/documents/P-7", json=body, headers=headers).status_code == 403
    assert local.put("/v1/documents/P-7", json=body).status_code == 200


def test_a_server_open_to_the_network_lets_nobody_change_documents_without_a_token(serve):
    with serve(local_admin=False) as client:
        refused = client.put("/v1/documents/P-7", json={"text": "damaged items within 7 days."})
        assert refused.status_code == 403
        assert "TWINLOOP_ADMIN_TOKEN" in refused.json()["error"]["message"]
        assert client.post("/v1/decisions", json=CASE).status_code == 200


def test_a_web_page_from_elsewhere_cannot_change_documents(local):
    preflight = local.options(
        "/v1/documents/P-7", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}
    )
    assert "access-control-allow-origin" not in preflight.headers
