"Other people's clients: names, probes, pages of other origins, embeddings, null, and tools by OpenAI's client and as LangChain sends them."
import contextlib, json, socket
from pathlib import Path
import pytest
from slm.core import SLMError
httpx, openai, _ = (pytest.importorskip(m, reason=f'needs: pip install {m}') for m in ('httpx', 'openai', 'xllamacpp'))
import torch
from slm.data.tokenizer import Tokenizer, train_bpe
from slm.data.world import World
from slm.model.gpt import GPT, GPTConfig
from slm.serve import api, gate as doors
from slm.serve.api import create_app
from slm.serve.engine import GGUFEngine, model_name, open_engine
from slm.serve.export import export_gguf, export_hf
from slm.serve.gate import Settings, in_background

@pytest.fixture(scope='session')
def trained(): return train_bpe([s.text for s in World().stories(0, 300)], 512)

def write(tok, path):
    "A GGUF file of random weights that never stops by itself at temperature 0"
    torch.manual_seed(1); model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, d_model=64, max_seq_len=1024)).eval()
    model.model.embed_tokens.weight.data[[tok.eot_id, tok.end_id]] = 0                   # tied to the head: some other token is always likelier
    export_gguf(model, tok, path, 'f32'); return path

@pytest.fixture(scope='session')
def plain(trained, tmp_path_factory): return write(trained, tmp_path_factory.mktemp('plain')/'plain-v0.3.gguf')

@pytest.fixture(scope='module')
def engine(plain): e = GGUFEngine(plain, slots=2, threads=1); yield e; e.close()

@contextlib.contextmanager
def running(engine, embed=None, **settings):
    "The address of a server"
    with in_background(create_app({'m': engine}, Settings(**settings), embed), http=api.Protocol) as url: yield url

@pytest.fixture(scope='module')
def url(engine):
    with running(engine) as url: yield url

ASK = [dict(role='user', content='Who has the kite?')]
def chat(url, messages=ASK, **kw): return httpx.post(f'{url}/v1/chat/completions', json=dict(model='m', messages=messages, max_tokens=4) | kw, timeout=60)

def error(r, status, **want):
    assert r.status_code == status, r.text
    e = r.json()['error']; assert {k: e[k] for k in want} == want, e
    return e['message']

# ---- names of models

def test_names_stay_whole(engine, tmp_path):
    assert engine.model == 'plain-v0.3' and model_name(tmp_path/'my-v0.3') == 'my-v0.3' and model_name('us/My_model-1.5B') == 'My_model-1.5B'

def test_a_folder_is_served_by_its_own_name(plain, tmp_path):
    (tmp_path/'my_run-v0.3').mkdir(); (tmp_path/'my_run-v0.3/x.gguf').symlink_to(plain)
    e = open_engine(tmp_path/'my_run-v0.3', 'gguf', slots=1, threads=1); assert e.model == 'my_run-v0.3'; e.close()

def test_a_folder_is_served_by_its_own_name_in_torch(trained, tmp_path):
    model = GPT(GPTConfig(vocab_size=trained.vocab_size, n_layer=1, n_head=2, d_model=32, max_seq_len=64)).eval()
    export_hf(model, trained, tmp_path/'my-v0.3')
    e = open_engine(tmp_path/'my-v0.3', 'torch', slots=1, compiled=False); assert e.model == 'my-v0.3'; e.close()

# ---- probes, slashes, types

@pytest.mark.parametrize('path', ['/healthz', '/readyz', '/metrics', '/', '/v1/models', '/v1/models/m'])
def test_head_is_get_without_a_body(url, path):
    while httpx.get(f'{url}/readyz').status_code != 200: pass
    r = httpx.head(url+path); assert r.status_code == 200 and r.content == b''

def test_a_slash_at_the_end_changes_nothing(url):
    for path in ('/v1/models/', '/v1/models/m/', '/healthz/'): assert httpx.get(url+path).status_code == 200
    assert httpx.post(f'{url}/v1/chat/completions/', json=dict(model='m', messages=ASK, max_tokens=2), timeout=60).status_code == 200

@pytest.mark.parametrize('headers', [{}, {'Content-Type': 'text/plain'}, {'Content-Type': 'application/x-www-form-urlencoded'}])
def test_what_is_not_said_to_be_json_is_415(url, headers):
    says = error(httpx.post(f'{url}/v1/completions', content=b'{"model":"m","prompt":"a"}', headers=headers), 415)
    assert 'Content-Type: application/json' in says

# ---- names of the server

def test_names_behind_a_proxy(engine):
    assert doors.check_bind('127.0.0.1', (), names=('Chat.example.org',)) == (*doors.LOOPBACK, 'chat.example.org')
    with running(engine, hosts=doors.check_bind('127.0.0.1', (), names=('chat.example.org',))) as url:
        get = lambda path, host: httpx.get(url+path, headers=dict(Host=host))
        for host in ('chat.example.org', 'Chat.Example.org:443', 'localhost.'): assert get('/v1/models', host).status_code == 200
        assert '--host-name' in error(get('/v1/models', 'evil.example'), 421, code='unknown_host')
        for path in doors.PROBES: assert get(path, 'evil.example').status_code in (200, 503)

def test_whoever_has_a_token_needs_no_name(engine):
    tokens = ('a-good-token',)
    with running(engine, tokens=tokens, hosts=doors.check_bind('127.0.0.1', tokens)) as url:
        assert httpx.get(f'{url}/v1/models', headers={'Host': 'evil.example', 'Authorization': 'Bearer a-good-token'}).status_code == 200
        error(httpx.get(f'{url}/v1/models', headers=dict(Host='evil.example')), 401)

@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason='needs IPv6')
def test_two_colons_are_all_addresses():
    with doors.listen('::', 0) as s:
        for host in ('127.0.0.1', '::1'): socket.create_connection((host, s.getsockname()[1])).close()

# ---- pages of other origins

def preflight(url, origin):
    asks = {'Origin': origin, 'Access-Control-Request-Method': 'POST', 'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-os'}
    return httpx.options(f'{url}/v1/chat/completions', headers=asks)

def test_a_named_page_may_ask(engine):
    with running(engine, tokens=('a-good-token',), origins=api.origins(('http://localhost:3000/',))) as url:
        r = preflight(url, 'http://localhost:3000'); assert r.status_code == 200 and r.headers['access-control-allow-origin'] == 'http://localhost:3000'
        assert {'authorization', 'content-type', 'x-stainless-os'} <= {h.strip() for h in r.headers['access-control-allow-headers'].lower().split(',')}
        r = httpx.get(f'{url}/v1/models', headers={'Origin': 'http://localhost:3000', 'Authorization': 'Bearer a-good-token'})
        assert r.status_code == 200 and r.headers['access-control-allow-origin'] == 'http://localhost:3000'
        r = httpx.get(f'{url}/v1/models', headers={'Origin': 'http://localhost:3000'})
        error(r, 401); assert r.headers['access-control-allow-origin'] == 'http://localhost:3000'  # else the page could not read what is wrong
        r = httpx.get(f'{url}/v1/models', headers={'Origin': 'https://evil.example', 'Authorization': 'Bearer a-good-token'})
        assert 'access-control-allow-origin' not in r.headers and preflight(url, 'https://evil.example').status_code == 400

def test_nobody_is_named_by_default(url):
    assert 'access-control-allow-origin' not in httpx.get(f'{url}/v1/models', headers={'Origin': 'http://localhost:3000'}).headers

@pytest.mark.parametrize('bad', ['localhost:3000', 'https://a.example/page', 'ftp://a.example', ''])
def test_an_origin_is_a_scheme_and_a_name(bad):
    with pytest.raises(SLMError, match='no origin'): api.origins((bad,))

# ---- who keeps silent

def test_one_client_cannot_keep_all_connections(engine, monkeypatch):
    monkeypatch.setattr(api.Protocol, 'each', 3)
    with running(engine) as url, contextlib.ExitStack() as stack:
        at = ('127.0.0.1', int(url.rsplit(':')[-1]))
        many = [stack.enter_context(socket.create_connection(at)) for _ in range(4)]
        many[3].settimeout(10)
        try: assert many[3].recv(1) == b''                                       # the fourth is closed at once
        except ConnectionError: pass
        with socket.create_connection(at, source_address=('127.0.0.2', 0)) as s: # another client is heard
            s.sendall(b'GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n'); assert s.recv(12) == b'HTTP/1.1 200'
        many[0].sendall(b'GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n'); assert many[0].recv(12) == b'HTTP/1.1 200'

# ---- embeddings

@pytest.fixture(scope='module')
def embedder(engine, plain):
    with running(engine, embed=dict(emb=api.gguf_embed(plain, threads=1))) as url: yield url

def embed(url, given, **kw): return httpx.post(f'{url}/v1/embeddings', json=dict(model='emb', input=given) | kw, timeout=60)

def test_embeddings_of_many_texts(embedder):
    assert len(embed(embedder, ['a']*2048).json()['data']) == 2048
    error(embed(embedder, ['a']*2049), 422, param='input')

def test_embeddings_of_token_ids(embedder, engine):
    ids = engine.tok.encode('The kite'); one = embed(embedder, 'The kite').json()['data'][0]['embedding']
    assert embed(embedder, ids).json()['data'][0]['embedding'] == pytest.approx(one, abs=1e-5)
    assert [len(embed(embedder, x).json()['data']) for x in (ids, [ids], [ids, ids[:1]])] == [1, 1, 2]
    client = openai.OpenAI(base_url=f'{embedder}/v1', api_key='none', max_retries=0)
    assert client.embeddings.create(model='emb', input=[ids]).data[0].embedding == pytest.approx(one, abs=1e-5)
    error(embed(embedder, [9999]), 400, param='input')

def test_embeddings_have_the_model_s_context(embedder):
    assert embed(embedder, [5]*1024).status_code == 200                          # 512 was all, once
    assert 'maximum context length is 1024' in error(embed(embedder, ['a', 'a '*1200]), 400, param='input', code='context_length_exceeded')

# ---- null

def test_an_assistant_may_say_nothing(url):
    for silent in (dict(role='assistant', content=None), dict(role='assistant')):
        assert chat(url, [*ASK, silent, dict(role='user', content='Go on.')]).status_code == 200
    assert 'content' in error(chat(url, [dict(role='user', content=None)]), 422)

def test_null_is_absent_at_every_depth(url):
    assert chat(url, [dict(role='user', content=[dict(type='text', text='Hi', cache_control=None)], name=None, tool_calls=None)]).status_code == 200
    assert chat(url, stream_options=None, stream=True).status_code == 200 and chat(url, stream_options=dict(include_usage=None), stream=True).status_code == 200
    assert chat(url, response_format=dict(type='text', json_schema=None)).status_code == 200
    assert chat(url, tools=None, tool_choice=None, parallel_tool_calls=None, functions=None, logit_bias=None).status_code == 200
