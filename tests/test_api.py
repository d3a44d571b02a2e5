"""The HTTP server on real sockets: OpenAI's client, bounds, people who leave, the end
of the process, and any request that fits (or does not fit) the schema."""
import contextlib, copy, json, os, re, signal, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from slm.core import SLMError
httpx, openai, _ = (pytest.importorskip(m, reason=f'needs: pip install {m}') for m in ('httpx', 'openai', 'xllamacpp'))
from slm.serve import api, gate as doors
from slm.serve.api import create_app
from slm.serve.gate import Settings, in_background
from slm.serve.engine import GGUFEngine, Request, answer_all

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A GGUF file of random weights that never stops by itself at temperature 0"
    import torch
    from slm.data.tokenizer import train_bpe
    from slm.data.world import World
    from slm.model.gpt import GPT, GPTConfig
    from slm.serve.export import export_gguf
    torch.manual_seed(1)
    tok = train_bpe([s.text for s in World().stories(0, 300)], 512); path = tmp_path_factory.mktemp('tiny')/'tiny.gguf'
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=4, n_head=4, d_model=256, max_seq_len=2048)).eval()
    # tied to the head: some other token is always likelier
    model.model.embed_tokens.weight.data[[tok.eot_id, tok.end_id]] = 0
    export_gguf(model, tok, path, 'q8_0')
    return path

@pytest.fixture(scope='module')
def engine(tiny):
    e = GGUFEngine(tiny, slots=2, threads=1); yield e; e.close()

def wait_for(f, seconds=20, what='it'):
    t0 = time.time()
    while time.time()-t0 < seconds:
        with contextlib.suppress(OSError, httpx.TransportError):
            if r := f(): return r
        time.sleep(.002)
    pytest.fail(f'waited {seconds} s for {what}')

class Held:
    """An engine whose requests stop after some pieces, until they are cancelled or
    `go` is set: what is asserted in between does not depend on speed"""
    def __init__(self, engine, after=1): self.engine, self.after, self.go = engine, after, threading.Event()
    def __getattr__(self, name): return getattr(self.engine, name)
    def submit(self, request, emit):
        if request.max_new_tokens <= 3: return self.engine.submit(request, emit)         # a warm-up
        seen, left, limit = [], threading.Event(), time.time()+60                           # a test that fails ends all the same
        def slow(p):
            emit(p); seen.append(p)
            while len(seen) >= self.after and time.time() < limit and not (p.finish_reason or left.is_set() or self.go.wait(.005)): pass
        cancel = self.engine.submit(request, slow)
        def leave(): left.set(); cancel()
        return leave

def ask_raw(url, **kw):
    "A request on a socket that nobody reads yet"
    body = json.dumps(dict(model='tiny') | kw).encode(); s = socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1])))
    s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n'
              % len(body) + body)
    return s

@contextlib.contextmanager
def running(engine, models=None, embed=None, lifespan=None, **settings):
    "A server that is ready; gives its app and address"
    app = create_app(models or {'tiny': engine}, Settings(**settings), embed, lifespan)
    with in_background(app, http=api.Protocol) as url:
        wait_for(lambda: httpx.get(f'{url}/readyz').status_code == 200); yield app, url

@pytest.fixture(scope='module')
def url(engine):
    with running(engine, queue=6, max_tokens=2000) as (_, url): yield url

@pytest.fixture(scope='module')
def client(url): return openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0, timeout=300)

def post(url, path='completions', headers=None, timeout=300, **kw):
    return httpx.post(f'{url}/v1/{path}', json=dict(model='tiny') | kw, headers=headers, timeout=timeout)

def error(r, status, **want):
    "The error of a response, after its form is checked"
    assert r.status_code == status, r.text
    e = r.json()['error']
    assert set(r.json()) == {'error'} and set(e) == {'message', 'type', 'param', 'code'} and e['message'] and '\n' not in e['message']
    assert {k: e[k] for k in want} == want; return e

ASK = [dict(role='user', content='Who has the kite?')]

# ---- OpenAI's client

def test_chat_says_what_the_engine_says(client, engine):
    r = client.chat.completions.create(model='tiny', messages=ASK, max_tokens=20, temperature=0)
    ids = engine.tok.chat(ASK, True)[0]; text, end = answer_all(engine, [Request(ids, max_new_tokens=20, temperature=0)])[0]
    c = r.choices[0]
    assert (c.message.role, c.message.content, c.finish_reason) == ('assistant', text, 'length') and text
    assert (r.usage.prompt_tokens, r.usage.completion_tokens, r.usage.total_tokens) == (len(ids), 20, len(ids)+20)
    assert r.object == 'chat.completion' and r.model == 'tiny'
    parts = client.chat.completions.create(model='tiny', messages=[dict(role='user', content=[dict(type='text', text=ASK[0]['content'])])],
                                           max_completion_tokens=20, temperature=0, stream=True)
    deltas = [p.choices[0] for p in parts]
    assert deltas[0].delta.role == 'assistant' and ''.join(d.delta.content or '' for d in deltas) == text
    assert [d.finish_reason for d in deltas if d.finish_reason] == ['length']

def test_stream_is_an_event_stream_with_usage_and_an_end(url):
    body = dict(model='tiny', messages=ASK, max_tokens=5, temperature=0, stream=True, stream_options=dict(include_usage=True), n=2)
    with httpx.stream('POST', f'{url}/v1/chat/completions', json=body) as s:
        assert s.status_code == 200 and s.headers['content-type'].startswith('text/event-stream') and 'content-length' not in s.headers
        lines = [l for l in s.iter_lines() if l]
    assert all(l.startswith('data: ') for l in lines) and lines[-1] == 'data: [DONE]'
    ev = [json.loads(l[6:]) for l in lines[:-1]]
    assert len({e['id'] for e in ev}) == 1
    assert all(e['object'] == 'chat.completion.chunk' for e in ev) and all(e['usage'] is None for e in ev[:-1])
    assert ev[-1]['choices'] == []
    assert ev[-1]['usage']['completion_tokens'] == 10 and ev[-1]['usage']['total_tokens'] == 10+ev[-1]['usage']['prompt_tokens']
    assert {c['index'] for e in ev for c in e['choices']} == {0, 1}

def test_completions_of_text_and_ids(client, engine):
    ids = engine.tok.encode('The kite'); kw = dict(model='tiny', temperature=0, max_tokens=6)
    one = client.completions.create(prompt='The kite', **kw).choices[0].text
    assert one == answer_all(engine, [Request(ids, max_new_tokens=6, temperature=0)])[0][0]
    r = client.completions.create(prompt=['The kite', 'A'], n=2, **kw)
    assert [c.index for c in r.choices] == [0, 1, 2, 3] and r.choices[0].text == r.choices[1].text == one != r.choices[2].text
    assert client.completions.create(prompt=ids, **kw).choices[0].text == one
    assert r.usage.prompt_tokens == len(ids)+len(engine.tok.encode('A')) and r.usage.completion_tokens == 24
    assert [c.text for c in client.completions.create(prompt=[ids, ids[:1]], **kw).choices][0] == one
    assert client.completions.create(model='tiny', prompt='The kite').usage.completion_tokens <= 16

def test_seed_stop_and_sampling_reach_the_engine(client, engine):
    def say(**kw): return [c.text for c in client.completions.create(model='tiny', prompt='The kite', max_tokens=12, **kw).choices]
    two = say(seed=5, n=2); assert two[0] != two[1] and say(seed=5, n=2) == two and say(seed=6) == two[1:]
    assert say(temperature=1, extra_body=dict(top_k=1)) == say(temperature=0)
    text = say(temperature=0)[0]; cut = text[3:6]
    r = client.completions.create(model='tiny', prompt='The kite', max_tokens=12, temperature=0, stop=[cut])
    assert r.choices[0].text == text[:text.index(cut)] and r.choices[0].finish_reason == 'stop'

def test_logprobs_in_both_dialects(client):
    kw = dict(model='tiny', max_tokens=4, temperature=0)
    c = client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=3, **kw).choices[0]; ts = c.logprobs.content
    assert len(ts) == 4
    assert ''.join(t.token for t in ts) == c.message.content
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == pytest.approx(t.logprob, abs=1e-6) for t in ts)
    assert all(bytes(t.bytes).decode('utf-8', 'replace') == t.token and t.logprob <= 0 for t in ts)
    c = client.completions.create(prompt='The', logprobs=2, **kw).choices[0]; l = c.logprobs
    assert l.text_offset == [len(''.join(l.tokens[:k])) for k in range(4)] and all(len(d) == 2 for d in l.top_logprobs)
    parts = list(client.completions.create(prompt='The', logprobs=2, stream=True, **kw))
    assert sum([p.choices[0].logprobs.text_offset for p in parts if p.choices[0].logprobs], []) == l.text_offset
    assert client.chat.completions.create(messages=ASK, **kw).choices[0].logprobs is None

def test_json_of_a_schema(client):
    schema = dict(type='object', properties=dict(n=dict(enum=[1, 2]), who=dict(enum=['Ann', 'Ben'])), required=['n', 'who'],
                  additionalProperties=False)
    r = client.chat.completions.create(model='tiny', messages=ASK, seed=1,
                                       response_format=dict(type='json_schema', json_schema=dict(name='x', schema=schema)))
    assert set(json.loads(r.choices[0].message.content)) == {'n', 'who'} and r.choices[0].finish_reason == 'stop'

SCHEMAS = [('uniqueItems', dict(type='array', uniqueItems=True)), ('propertyNames', dict(propertyNames=dict(enum=['a']))),
           ('not', {'not': {}}), ('if', {'if': {}, 'then': {}}),
    ('dependentRequired', dict(dependentRequired=dict(a=['b']))), ('look', dict(type='string', pattern='^(?=a)')),
    ('pattern|regex', dict(type='string', pattern=r'\bx')), ('regex', dict(type='string', pattern='^[a$')),
    ('anyOf', dict(enum=[])), ('minimum', dict(type='integer', minimum=5, maximum=2)),
    ('minLength', dict(type='string', minLength=5, maxLength=2)), ('type', dict(type=5)), ('no text', {'$ref': '#'}),
    ('/nowhere', {'$ref': '#/nowhere'}), ('minItems', dict(type='array', minItems=10**9)),
    ('maxItems', dict(type='array', maxItems=10**9)), ('minLength', dict(type='string', minLength=10**9)),
    ('pattern', dict(type='string', pattern='^a{99999}$')),
    ('x-guidance', {'type': 'array', 'uniqueItems': True, 'x-guidance': dict(lenient=True)}),
    ('lexer', dict(type='string', pattern='^(a{1000}){1000}$'))]

@pytest.mark.parametrize('says,schema', SCHEMAS, ids=[f'{k}-{i}' for i,(k,_) in enumerate(SCHEMAS)])
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(url, says, schema):
    for stream in (False, True):
        r = post(url, 'chat/completions', messages=ASK, max_tokens=5, stream=stream,
                 response_format=dict(type='json_schema', json_schema=dict(name='x', schema=schema)))
        assert re.search(says, error(r, 400, param='response_format')['message'])

def test_a_schema_in_any_place_is_held_to_or_refused(url):
    team = dict(type='object', properties=dict(team=dict(enum=[1])), required=['team'], additionalProperties=False)
    say = lambda **kw: post(url, 'chat/completions', messages=ASK, seed=1, max_tokens=300, **kw)
    held = lambda f: json.loads(say(response_format=f).json()['choices'][0]['message']['content']) == dict(team=1)
    assert held(dict(type='json_object', schema=team)) and held(dict(type='json_schema', json_schema=dict(schema=team, name=None)))
    assert held(dict(type='json_schema', json_schema=dict(schema={'$ref': '#/$defs/a~1b', '$defs': {'a/b': team}})))
    assert held(dict(type='json_schema', json_schema=dict(schema={'$ref': '#/$defs/%5B', '$defs': {'[': team}})))
    for f in (dict(type='json_schema', json_schema=team), dict(type='json_schema', json_schema=dict(name='t', strict=True)),
              dict(type='json_schema', schema=team), dict(type='text', schema=team)):
        error(say(response_format=f), 400, param='response_format')
    for k,v in dict(guided_json=team, json_schema=team, grammar='root ::= "yes"', guided_choice=['a'], guided_regex='a',
                    structured_outputs=dict(json=team)).items():
        error(say(**{k: v}), 400, param=k, code='unsupported_parameter')

def test_context_length_in_the_words_that_clients_look_for(url):
    e = error(post(url, 'chat/completions', messages=[dict(role='user', content='word '*3000)]), 400, param='messages',
              code='context_length_exceeded', type='invalid_request_error')
    assert 'maximum context length is 2048 tokens' in e['message']
    error(post(url, prompt='word '*3000), 400, param='prompt', code='context_length_exceeded')

@pytest.mark.parametrize('says,param,body', [
    ('messages.0.content.0.text: Input should be a valid string', 'messages',
     dict(messages=[dict(role='user', content=[dict(type='text', text=5)])])),
    ('messages.1.role', 'messages', dict(messages=[*ASK, dict(role='robot', content='x')])),
    ('messages.0: content is missing', 'messages', dict(messages=[dict(role='user', content=None)])),
    ('messages.0.content: Input should be a valid string or a valid list', 'messages', dict(messages=[dict(role='user', content=5)])),
    ('tool_choice.function', 'tool_choice', dict(messages=ASK, tool_choice=dict(type='function'))),
    ('stop.1', 'stop', dict(messages=ASK, stop=['a', '']))])
def test_the_field_of_a_union_is_named(url, says, param, body):
    assert error(post(url, 'chat/completions', **body), 422, param=param)['message'].startswith(says)

def test_broken_json_has_no_field(url):
    e = error(httpx.post(f'{url}/v1/completions', content=b'{"model": }', headers={'Content-Type': 'application/json'}), 400, param=None,
              code='invalid_json')
    assert 'character 10' in e['message']

@pytest.mark.parametrize('path,body',
                         [('chat/completions', dict(messages=[dict(role='user', content='nice \ud83d')])),
                          ('completions', dict(prompt='\ud83d')), ('chat/completions', dict(messages=ASK, model='x\ud83d')),
    ('embeddings', dict(input='\ud83d')), ('preferences', dict(messages=ASK, responses=[dict(text='\ude00')], choice='up')),
    ('completions', dict(prompt='a', user={'\udfff': 1}))])
def test_half_an_emoji_is_400(url, path, body):
    for ascii in (True, False):
        raw = json.dumps(dict(model='tiny') | body, ensure_ascii=ascii).encode('utf-8', 'surrogatepass')
        error(httpx.post(f'{url}/v1/{path}', content=raw, headers={'Content-Type': 'application/json'}), 400, code='invalid_text')

def test_a_whole_emoji_is_text(url): assert post(url, prompt='\U0001f600', max_tokens=1).status_code == 200

def test_null_is_absent_wherever_it_stands(url):
    say = lambda *ms, **kw: post(url, 'chat/completions', messages=[*ASK, *ms], max_tokens=2, **kw)
    for content in (dict(content=None), dict(content=''), {}):
        assert say(dict(role='assistant', tool_calls=None, name=None, **content), *ASK).status_code == 200
    assert say(stream_options=dict(include_usage=None), response_format=dict(type='text', json_schema=None), tools=None,
               tool_choice=None).status_code == 200
    error(say(dict(role='assistant', content=None, tool_calls=[dict(id='c', type='function', function=dict(name='f', arguments='{}'))])),
          400, param='messages')

def test_usual_meanings_of_odd_numbers(url):
    say = lambda **kw: post(url, prompt='The kite', max_tokens=12, **kw).json()['choices'][0]['text']
    assert say(top_p=0) == say(top_p=0) == say(temperature=0) and say(top_k=-1, seed=5) == say(seed=5)
    for seed in (-1, 2**32-1, 2**33-1, 2**63-1): assert say(seed=seed) == say(seed=seed)

def test_models(client):
    m, = client.models.list().data; assert m.id == 'tiny' and m.object == 'model' and client.models.retrieve('tiny').id == 'tiny'
    with pytest.raises(openai.NotFoundError) as e: client.models.retrieve('gpt-9')
    assert e.value.code == 'model_not_found'
    with pytest.raises(openai.NotFoundError): client.chat.completions.create(model='gpt-9', messages=ASK)

def test_client_reads_our_errors(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model='tiny', messages=ASK, tools=[dict(type='function', function=dict(name='f'))])
    assert e.value.param == 'tools' and e.value.code == 'unsupported_parameter'
    with pytest.raises(openai.UnprocessableEntityError) as e: client.chat.completions.create(model='tiny', messages=ASK, temperature=9)
    assert e.value.param == 'temperature'

# ---- what is wrong, and how it is said

@pytest.mark.parametrize('status,param,body', [
    (422, 'prompt', dict(prompt=7)), (422, 'prompt', {}), (422, 'max_tokens', dict(prompt='a', max_tokens=0)),
    (422, 'seed', dict(prompt='a', seed=2**64)), (400, 'guided_json', dict(prompt='a', guided_json=dict(type='object'))),
    (422, 'n', dict(prompt='a', n=0)),
    (422, 'stop', dict(prompt='a', stop='')), (422, 'temperature', dict(prompt='a', temperature='hot')), (400, 'prompt', dict(prompt='')),
    (400, 'prompt', dict(prompt='a '*3000)), (400, 'prompt', dict(prompt=[9999])),
    (400, 'max_tokens', dict(prompt='a', max_tokens=5000)), (400, 'n', dict(prompt='a', n=100)),
    (400, 'best_of', dict(prompt='a', best_of=2)), (400, 'echo', dict(prompt='a', echo=True)),
    (400, 'suffix', dict(prompt='a', suffix='b')), (400, 'logit_bias', dict(prompt='a', logit_bias={'1': 2})),
    (400, 'frequency_penalty', dict(prompt='a', frequency_penalty=-1)),
    (400, 'stream_options', dict(prompt='a', stream_options=dict(include_usage=True))),
    (400, 'response_format', dict(prompt='a', response_format=dict(type='json_schema'))),
    (404, 'model', dict(prompt='a', model='other')), (422, 'model', dict(prompt='a', model=None))])
def test_bad_completions(url, status, param, body):
    e = error(post(url, **body), status, param=param); assert e['type'] == 'invalid_request_error'

def test_bad_chats(url):
    say = lambda **m: post(url, 'chat/completions', messages=[m])
    error(say(role='user', content=[dict(type='image_url', image_url=dict(url='x'))]), 400, param='messages', code='unsupported_content')
    error(say(role='tool', content='x'), 400, param='messages')
    error(say(role='robot', content='x'), 422, param='messages')
    error(post(url, 'chat/completions', messages=[]), 422)
    error(post(url, 'chat/completions', messages=ASK, top_logprobs=2), 400, param='top_logprobs')
    assert say(role='developer', content='Be brief.').status_code == 200

def test_bytes_that_are_no_request(url):
    send = lambda body, **h: httpx.post(f'{url}/v1/completions', content=body, headers={'Content-Type': 'application/json'} | h)
    for body in (b'{', b'\xff\xfe', b'['*100_000, b'{"model":"tiny","prompt":"\\ud800"}',
                 b'{"model":"tiny","prompt":"a","temperature":NaN}', b'{"model":"tiny","prompt":"a","seed":'+b'9'*5000+b'}', b'[]', b''):
        assert send(body).status_code in (400, 422), body[:40]; error(send(body), send(body).status_code)
    error(httpx.post(f'{url}/v1/completions', content=b'{"model":"tiny","prompt":"a"}', headers={'Content-Type': 'text/plain'}), 415)
    error(httpx.get(f'{url}/nothing'), 404); error(httpx.get(f'{url}/v1/completions'), 405)
    with socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1]))) as s:
        s.sendall(b'nonsense\r\n\r\n')
        got = s.makefile('rb').read(); assert got.startswith(b'HTTP/1.1 400') and json.loads(got.split(b'\r\n\r\n')[1])['error']['message']

def test_a_fault_of_ours_is_500_in_the_same_form(engine):
    class Broken:
        name, model, tok, max_seq_len, slots = 'broken', 'broken', engine.tok, 99, 1
        def submit(self, request, emit):
            emit(doors.Piece('half', completion_tokens=1))
            threading.Timer(.1, emit, [doors.Piece(finish_reason='error', error='the disk melted', completion_tokens=1)]).start()
            return lambda: None
    class Worse(Broken):
        def submit(self, request, emit): return 1/0
    app = create_app({'broken': Broken(), 'worse': Worse()})
    with in_background(app) as url:
        error(httpx.get(f'{url}/readyz'), 503, code='not_ready'); wait_for(lambda: app.state.gate.fault)
        assert 'melted' in error(httpx.get(f'{url}/readyz'), 503, code='not_ready')['message']
        assert httpx.get(f'{url}/healthz').status_code == 200
        error(post(url, model='broken', prompt='a'), 500, code='engine_error', type='server_error')
        parts = post(url, model='broken', prompt='a', stream=True).text.strip().split('\n\n')
        assert len(parts) == 2
        assert json.loads(parts[0][6:])['choices'][0]['text'] == 'half' and json.loads(parts[1][6:])['error']['code'] == 'engine_error'
        error(post(url, model='worse', prompt='a'), 500, type='server_error'); assert app.state.gate.load == {'broken': 0, 'worse': 0}
    app = create_app({'worse': Worse()})
    with in_background(app) as url:
        wait_for(lambda: app.state.gate.fault); assert 'ZeroDivisionError' in error(httpx.get(f'{url}/readyz'), 503)['message']

# ---- bounds

def test_token_and_names(engine):
    with running(engine, tokens=('first-token', 'second-token'), hosts=doors.LOOPBACK) as (app, url):
        for path in ('/healthz', '/readyz', '/'): assert httpx.get(url+path).status_code == 200
        for path in ('/metrics', '/openapi.json', '/v1/models', '/nothing'):
            e = error(httpx.get(url+path), 401, code='invalid_api_key'); assert 'Authorization' in e['message']
            assert httpx.get(url+path).headers['www-authenticate'] == 'Bearer'
        for t in ('first-token', 'second-token'):
            assert httpx.get(f'{url}/v1/models', headers={'Authorization': f'Bearer {t}'}).status_code == 200
        for h in ('Bearer first', 'Bearer first-token2', 'first-token', 'Basic first-token', 'Bearer fïrst'):
            error(httpx.get(f'{url}/v1/models', headers={'Authorization': h.encode()}), 401)
        with pytest.raises(openai.AuthenticationError): openai.OpenAI(base_url=f'{url}/v1', api_key='wrong', max_retries=0).models.list()
        assert httpx.get(f'{url}/', headers=dict(Host='evil.example')).status_code == 200           # it has no token
        error(httpx.post(f'{url}/'), 401)

def test_a_metrics_token_opens_the_figures_alone(engine):
    with running(engine, tokens=('client-token', 'metrics look-only-token')) as (app, url):
        ask = lambda token, path, how='GET', **kw: httpx.request(how, url+path, headers={'Authorization': f'Bearer {token}'}, **kw)
        for path in ('/metrics', '/metrics/'): assert 'slm_http_requests' in ask('look-only-token', path).text
        for path in ('/v1/models', '/openapi.json', '/nothing', '/metrics/x', '//metrics'):
            error(ask('look-only-token', path), 403, code='metrics_only')
        error(ask('look-only-token', '/v1/completions', 'POST', json=dict(model='tiny', prompt='a', max_tokens=1)), 403)
        error(ask('look-only-token', '/v1/chat/completions', 'POST', json={}), 403)
        for t in ('look-only', 'metrics', 'metrics look-only-token'): error(ask(t, '/metrics'), 401)
        for path in ('/metrics', '/v1/models'): assert ask('client-token', path).status_code == 200
        error(httpx.get(f'{url}/metrics', headers={'Authorization': 'Basic look-only-token'}), 401)
        error(httpx.get(f'{url}/v1/models', headers={'Authorization': 'Basic look-only-token'}), 401)
    with running(engine, tokens=('metrics look-only-token',)) as (app, url):                      # no client's token is no open door
        error(httpx.get(f'{url}/v1/models'), 401)

def test_token_file(tmp_path):
    f = tmp_path/'t'
    f.write_text('# one\n\n  a-good-token  \nanother-one\n'); f.chmod(0o600); assert doors.read_tokens(f) == ('a-good-token', 'another-one')
    f.write_text('a-good-token\n  metrics   another-one\n'); assert doors.read_tokens(f) == ('a-good-token', 'metrics another-one')
    f.chmod(0o644)
    with pytest.warns(UserWarning, match='chmod 600'): doors.read_tokens(f)
    for bad,says in (('', 'no token'), ('# a\n', 'no token'), ('short', '8 characters'), ('with space inside', '8 characters'),
                     ('a-good-token\nmetrics short', '8 characters'), ('a-good-token\nfigures another-one', '8 characters'),
                     ('metrics another-one', 'no token of a client'), ('a-good-token\nmetrics a-good-token', 'the same token')):
        f.write_text(bad); f.chmod(0o600)
        with pytest.raises(SLMError, match=says): doors.read_tokens(f)
    with pytest.raises(SLMError, match='cannot read'): doors.read_tokens(tmp_path/'none')
    with pytest.raises(SLMError, match='--no-token'): doors.check_bind('0.0.0.0', ())
    assert doors.check_bind('127.0.0.1', ('a-good-token',)) is None
    assert doors.check_bind('0.0.0.0', (), open=True) is None and doors.check_bind('::1', ()) == doors.LOOPBACK

def test_body_is_bounded_whatever_it_claims(engine, monkeypatch):
    with running(engine, max_body=2000) as (app, url):
        error(post(url, prompt='a'*3000), 413, code='request_too_large')
        error(httpx.post(f'{url}/v1/completions', content=(b'x'*500 for _ in range(9)), headers={'Content-Type': 'application/json'}), 413)
        assert post(url, prompt='a'*1500, max_tokens=1).status_code in (200, 400)
        monkeypatch.setattr(doors, 'BODY_SECONDS', .3)
        with socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1]))) as s:
            s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\nslow')
            assert b'408' in s.recv(100)
        wait_for(lambda: app.state.gate.active == 0)

def test_silence_and_crowds_are_cut_off(engine, monkeypatch):
    monkeypatch.setattr(api, 'HEADER_SECONDS', .3); monkeypatch.setattr(api.Protocol, 'most', 5)
    with running(engine) as (_, url):
        port = int(url.rsplit(':')[-1]); t0 = time.time()
        with socket.create_connection(('127.0.0.1', port)) as s: s.sendall(b'GET /healthz HT'); assert dead(s, 30) and .2 < time.time()-t0
        with contextlib.ExitStack() as stack:
            many = [stack.enter_context(socket.create_connection(('127.0.0.1', port))) for _ in range(9)]
            wait_for(lambda: sum(dead(s, .02) for s in many) >= 3)
        # an answer may take longer than silence
        t = wait_for(lambda: post(url, prompt='a', max_tokens=1000, temperature=0)); assert t.status_code == 200

def dead(s, wait=5):
    s.settimeout(wait)
    try: return s.recv(1) == b''
    except ConnectionError: return True
    except TimeoutError: return False

def test_a_full_queue_is_429_with_a_hint(engine):
    held = Held(engine)
    with running(held, queue=2, max_tokens=2000) as (app, url), ThreadPoolExecutor(8) as ex:
        fs = [ex.submit(post, url, prompt='a', max_tokens=40, temperature=0) for _ in range(8)]
        wait_for(lambda: sum(f.done() for f in fs) == 4); held.go.set(); rs = [f.result() for f in fs]
        assert sorted(r.status_code for r in rs) == [200]*4+[429]*4
        for r in rs:
            if r.status_code == 429:
                error(r, 429, code='queue_full', type='rate_limit_error'); assert 1 <= int(r.headers['retry-after']) <= 121
        wait_for(lambda: app.state.gate.load['tiny'] == 0); assert post(url, prompt='a', max_tokens=1).status_code == 200
        error(post(url, prompt='a', n=5), 400, param='n')

def test_time_is_bounded(engine):
    with running(Held(engine, after=3), timeout=1, max_tokens=2000) as (app, url):
        kw = dict(prompt='a', max_tokens=2000, temperature=0)
        error(post(url, **kw), 504, code='timeout', type='server_error'); wait_for(lambda: not engine.running)
        text = post(url, stream=True, **kw).text.strip().split('\n\n')
        assert json.loads(text[-1][6:])['error']['code'] == 'timeout' and len(text) > 1 and json.loads(text[0][6:])['choices']
        wait_for(lambda: app.state.gate.load['tiny'] == 0)
        with pytest.raises(openai.APIError, match='not done within'):
            list(openai.OpenAI(base_url=f'{url}/v1', api_key='x').completions.create(model='tiny', stream=True, **kw))
        assert 'reason="timeout"} 3.0' in httpx.get(f'{url}/metrics').text

# ---- who leaves frees the slot

@pytest.mark.parametrize('stream', [True, False])
def test_a_client_who_leaves_frees_the_slot_within_a_step(engine, stream):
    held = Held(engine)
    with running(held, max_tokens=2000) as (app, url):                                  # the warm-up ends with its first piece
        gate = app.state.gate
        s = ask_raw(url, prompt='a', max_tokens=2000, temperature=0, stream=stream); wait_for(lambda: len(engine.running) == 1)
        if stream: assert s.recv(100).startswith(b'HTTP/1.1 200')
        s.close(); wait_for(lambda: not engine.running and gate.load['tiny'] == 0)
        figures = httpx.get(f'{url}/metrics').text
        assert re.search(r'slm_answers_total\{model="tiny",reason="gone"\} 1.0', figures)
        assert float(re.search(r'slm_tokens_total\{kind="completion",model="tiny"\} (\S+)', figures)[1]) <= 4
        wait_for(lambda: gate.active == 0); assert len(answer_all(engine, [Request([1, 2], 3)]*2)) == 2

def test_who_leaves_the_queue_never_runs(engine):
    held = Held(engine)
    with running(held, max_tokens=2000, queue=4) as (app, url), ThreadPoolExecutor(2) as ex:
        load = lambda: app.state.gate.load['tiny']
        long = [ex.submit(post, url, prompt='a', max_tokens=60, temperature=0) for _ in range(2)]; wait_for(lambda: load() == 2)
        s = ask_raw(url, prompt='b', max_tokens=2000); wait_for(lambda: load() == 3); s.close(); wait_for(lambda: load() == 2)
        held.go.set(); assert all(f.result().status_code == 200 for f in long); wait_for(lambda: load() == 0)
        assert 'slm_tokens_total{kind="completion",model="tiny"} 120.0' in httpx.get(f'{url}/metrics').text

# ---- figures, kept answers, filter, embeddings, mounted apps

def test_figures_parse_and_count(engine):
    from prometheus_client.parser import text_string_to_metric_families as parse
    with running(engine) as (_, url):
        post(url, prompt='The kite', max_tokens=7, temperature=0)
        post(url, prompt=''); httpx.get(f'{url}/somewhere/{time.time()}'); post(url, prompt='The kite', max_tokens=3, temperature=0, n=2)
        got = {(s.name, *sorted(s.labels.items())): s.value for f in parse(httpx.get(f'{url}/metrics').text) for s in f.samples}
        m = ('model', 'tiny')
        assert got['slm_http_requests_total', ('path', '/v1/completions'), ('status', '200')] == 2
        assert got['slm_http_requests_total', ('path', '/v1/completions'), ('status', '400')] == 1
        assert got['slm_http_requests_total', ('path', 'other'), ('status', '404')] == 1
        assert got['slm_tokens_total', ('kind', 'completion'), m] == 13
        assert got['slm_answers_total', m, ('reason', 'length')] == 3
        assert got['slm_time_to_first_token_seconds_count', m] == 3 and got['slm_inter_token_seconds_count', m] >= 3
        assert got['slm_running', m] == got['slm_waiting', m] == got['slm_draining',] == 0
    with running(engine) as (_, url): assert 'reason="length"' not in httpx.get(f'{url}/metrics').text # a registry of its own

def test_kept_answers(engine):
    with running(engine, cache=.003) as (app, url):
        hit = lambda **kw: post(url, max_tokens=5, **kw).headers.get('x-slm-cache')
        assert [hit(prompt='a', temperature=0) for _ in range(2)] == ['miss', 'hit']
        assert hit(prompt='a') is None and hit(prompt='a', temperature=0, logprobs=1) is None
        assert [hit(prompt='a', seed=s) for s in (1, 1, 2)] == ['miss', 'hit', 'miss']
        assert hit(prompt='a', temperature=0, n=2) == 'miss' and hit(prompt='a', temperature=0, user='x') == 'hit'
        text = [post(url, prompt='b', temperature=0, stream=s).text for s in (False, True, True)]
        parts = [json.loads(l[6:]) for l in text[1].strip().split('\n\n')[:-1]]
        assert ''.join(p['choices'][0]['text'] for p in parts) == json.loads(text[0])['choices'][0]['text']
        assert parts[-1]['choices'][0]['finish_reason'] == 'length'
        for i in range(50): hit(prompt=f'other {i}', temperature=0)
        assert hit(prompt='a', temperature=0) == 'miss' and app.state.gate.cache.used <= 3145
    with running(engine) as (_, url): assert 'x-slm-cache' not in post(url, prompt='a', temperature=0).headers

def test_output_filter(engine):
    seen = []
    def score(text): seen.append(text); return 1. if len(seen) > 1 else 0.
    with running(engine, output_filter=lambda t: 0., max_tokens=300) as (_, url):
        free = [post(url, prompt='a', max_tokens=300, temperature=0, stream=s).text for s in (False, True)]
        assert '[DONE]' in free[1]; plain = json.loads(free[0])['choices'][0]['text']
        assert plain == answer_all(engine, [Request(engine.tok.encode('a'), max_new_tokens=300, temperature=0)])[0][0]
    with running(engine, output_filter=lambda t: 1.) as (_, url):
        c = post(url, prompt='a', max_tokens=9, temperature=0).json()['choices'][0]
        assert (c['text'], c['finish_reason']) == ('', 'content_filter')
        wait_for(lambda: not engine.running)

def test_embeddings(engine, tiny):
    with running(engine, embed=dict(emb=api.gguf_embed(tiny, threads=1))) as (_, url):
        client = openai.OpenAI(base_url=f'{url}/v1', api_key='x')
        a = client.embeddings.create(model='emb', input=['The kite', 'A dog'])
        b = client.embeddings.create(model='emb', input='The kite', encoding_format='float')
        assert len(a.data) == 2
        assert len(a.data[0].embedding) == 256
        assert a.data[0].embedding == pytest.approx(b.data[0].embedding, abs=1e-5) and a.usage.prompt_tokens > b.usage.prompt_tokens > 0
        assert sum(x*x for x in b.data[0].embedding) == pytest.approx(1, abs=1e-4) and a.data[0].embedding != a.data[1].embedding
        assert [m.id for m in client.models.list()] == ['tiny', 'emb']
        assert len(client.embeddings.create(model='emb', input=['a']*2048).data) == 2048
        assert len(client.embeddings.create(model='emb', input='a '*600).data) == 1
        ids = engine.tok.encode('The kite'); c = client.embeddings.create(model='emb', input=[ids, ids[:1]])
        assert c.data[0].embedding == pytest.approx(b.data[0].embedding, abs=1e-5) and len(c.data) == 2
        assert client.embeddings.create(model='emb', input=ids).data[0].embedding == pytest.approx(b.data[0].embedding, abs=1e-5)
        error(post(url, 'embeddings', model='emb', input=[99999]), 400, param='input')
        error(post(url, 'embeddings', model='emb', input=['a']*2049), 422, param='input')
        error(post(url, 'embeddings', model='emb', input=''), 400, param='input')
        error(post(url, 'embeddings', model='tiny', input='a'), 404)
        error(post(url, 'embeddings', model='emb', input='a '*3000), 400, param='input', code='context_length_exceeded')
        error(post(url, 'embeddings', model='emb', input='a', dimensions=5), 400, param='dimensions')
    with running(engine) as (_, url): error(post(url, 'embeddings', model='emb', input='a'), 404, code='model_not_found')

def test_mounted_apps_stand_behind_the_guard(engine, monkeypatch):
    import asyncio
    from fastapi import FastAPI
    monkeypatch.setattr(doors, 'GRACE', .1)
    other, log = FastAPI(), []
    @other.get('/x')
    async def x(): return dict(log=list(log))
    @other.get('/slow')
    async def slow(): await asyncio.sleep(60)
    @contextlib.asynccontextmanager
    async def life(app):
        app.mount('/rag', other); log.append('in'); yield; log.append('out')
    with running(engine, tokens=('a-good-token',), lifespan=life, timeout=.2, max_body=100) as (_, url):
        error(httpx.get(f'{url}/rag/x'), 401); key = dict(Authorization='Bearer a-good-token')
        error(httpx.get(f'{url}/rag/slow', headers=key), 504, code='timeout')
        error(httpx.post(f'{url}/rag/x', headers=key, content=b'x'*101), 413)
        r = httpx.get(f'{url}/rag/x', headers=key); assert r.json() == dict(log=['in'])
    assert log == ['in', 'out']

def test_preferences(engine, tmp_path):
    from slm.train.annotate import PreferenceStore
    with running(engine, preferences=tmp_path/'p.db') as (_, url):
        r = lambda *ts: [dict(text=t, run='tiny', sampling=dict(seed=1)) for t in ts]
        send = lambda **kw: post(url, 'preferences', messages=ASK, **kw)
        assert send(responses=r('A', 'B'), choice=1, seconds=3).status_code == 200
        assert send(responses=r('B', 'A'), choice='tie', annotator='bob').status_code == 200
        assert send(responses=r('A'), choice='up').json() == dict(pairs=0) and send(responses=r('C'), choice='down').json() == dict(pairs=1)
        error(send(responses=r('A'), choice=0), 400, param='choice')
        error(send(responses=r('A', 'B'), choice='up'), 400)
        error(send(responses=r('A', 'B'), choice=2), 400); error(send(responses=r('A', 'A'), choice=0), 400)
        assert httpx.get(f'{url}/v1/preferences').json() == dict(items=2, judgements=3)
    pairs = PreferenceStore(tmp_path/'p.db').pairs()
    assert [(p['chosen'], p['rejected'], p['annotator']) for p in pairs] == [('B', 'A', 'page'), ('A', 'C', 'page')]
    assert pairs[0]['prompt'] == ASK
    with running(engine) as (_, url): error(httpx.get(f'{url}/v1/preferences'), 404, code='no_preferences')

# ---- tools

TEMPLATE = """{% if tools %}<|system|>{% for t in tools %}{{ t.function | tojson }}{% endfor %}<|end|>{% endif %}{% for m in messages \
%}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}MARK{{ c.function.name }}", "arguments": {{ c.function.arguments | \
tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
ADD = dict(type='function',
           function=dict(name='add', description='Adds',
                         parameters=dict(type='object', properties=dict(a=dict(enum=[1, 2]), b=dict(enum=[3])), required=['a', 'b'],
                                         additionalProperties=False)))
SUB = dict(type='function',
           function=dict(name='sub-it',
                         parameters=dict(type='object', properties=dict(n=dict(enum=['x'])), required=['n'], additionalProperties=False),
                         strict=True))

@pytest.fixture
def caller(engine, monkeypatch):
    "The engine with a template that has a place for tools; gives a client, and a function that sets the mark before a call"
    plain = engine.tok
    def template(mark): engine.tok = copy.copy(plain); engine.tok.chat_template = TEMPLATE.replace('MARK', mark)
    template('<tool_call>\n{"name": "')
    with running(engine, max_tokens=2000) as (_, url):
        yield openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0, timeout=300), template
    engine.tok = plain

@pytest.mark.parametrize('choice', ['required', dict(type='function', function=dict(name='sub-it'))], ids=['required', 'named'])
def test_a_call_that_must_come(caller, choice):
    client, _ = caller; seen = set()
    for seed in range(6):
        r = client.chat.completions.create(model='tiny', messages=ASK, tools=[ADD, SUB], tool_choice=choice, seed=seed,
                                           max_tokens=300).choices[0]
        assert r.finish_reason == 'tool_calls' and r.message.content is None; c, = r.message.tool_calls
        args = json.loads(c.function.arguments); seen.add(c.function.name); assert c.type == 'function' and len(c.id) == 9
        assert args in ([dict(a=1, b=3), dict(a=2, b=3)] if c.function.name == 'add' else [dict(n='x')])
    assert seen == ({'add', 'sub-it'} if choice == 'required' else {'sub-it'})
    parts = list(client.chat.completions.create(model='tiny', messages=ASK, tools=[ADD, SUB], tool_choice=choice, seed=5, max_tokens=300,
                                                stream=True))
    calls = [t for p in parts for t in p.choices[0].delta.tool_calls or []]
    assert calls[0].function.name == c.function.name
    assert json.loads(''.join(t.function.arguments for t in calls)) == args and parts[-1].choices[0].finish_reason == 'tool_calls'

def test_a_call_that_may_come(caller):
    client, template = caller; template('e')
    kw = dict(model='tiny', messages=ASK, tools=[ADD], max_tokens=600)         # a letter as the mark: even noise comes upon it
    rs = client.chat.completions.create(n=2, seed=1, **kw).choices; called = [c for c in rs if c.message.tool_calls]; assert called
    for c in called:
        assert c.finish_reason == 'tool_calls'
        assert json.loads(c.message.tool_calls[0].function.arguments) in [dict(a=1, b=3), dict(a=2, b=3)]
    parts = [p.choices[0] for p in client.chat.completions.create(n=2, seed=1, stream=True, **kw)]
    for c in rs: assert ''.join(p.delta.content or '' for p in parts if p.index == c.index).rstrip() == (c.message.content or '')
    assert not client.chat.completions.create(tool_choice='none', **kw).choices[0].message.tool_calls

def test_a_history_with_calls_is_rendered_and_its_marks_stay_text(caller, engine):
    client, _ = caller; seen = []; submit = engine.submit
    engine.submit = lambda r, emit: (seen.append(r.ids), submit(r, emit))[1]
    try:
        client.chat.completions.create(model='tiny', tools=[ADD], max_tokens=2,
                                       messages=[*ASK,
                                                 dict(role='assistant', content=None,
                                                      tool_calls=[dict(id='c1', type='function',
                                                                       function=dict(name='add', arguments='{"a": "<|end|>"}'))]),
                                                                       dict(role='tool', tool_call_id='c1', content='4<|end|>')])
    finally: del engine.submit
    text = engine.tok.tok.decode(seen[0], skip_special_tokens=False)
    assert '"name": "add", "arguments": {"a": "<|end|>"}}\n</tool_call>' in text
    assert '<|tool|>4<|end|>' in text and '"description": "Adds"' in text
    # tools, user, assistant, tool: none from what was said
    assert seen[0].count(engine.tok.end_id) == 4

def test_langchain_s_shape_of_bind_tools(caller):
    client, _ = caller
    body = dict(model='tiny', messages=[dict(role='user', content='Hi')], stream=False, temperature=0.0, max_completion_tokens=300, n=1,
                parallel_tool_calls=False, seed=None,
        tools=[ADD, SUB], tool_choice=dict(type='function', function=dict(name='add')))
    r = httpx.post(f'{client.base_url}chat/completions', json=body, timeout=300).json()
    assert r['choices'][0]['message']['tool_calls'][0]['function']['name'] == 'add'

def test_tools_that_cannot_be_held_to(caller, url):
    client, template = caller; base = str(client.base_url).removesuffix('/v1/')
    say = lambda **kw: post(base, 'chat/completions', messages=ASK, **kw)
    bad = dict(type='function',
               function=dict(name='f', parameters=dict(type='object', properties=dict(x=dict(type='array', uniqueItems=True)))))
    assert 'uniqueItems' in error(say(tools=[bad]), 400, param='tools')['message']
    error(say(tools=[ADD], tool_choice=dict(type='function', function=dict(name='g'))), 400, param='tool_choice')
    error(say(tools=[ADD], response_format=dict(type='json_object')), 400, param='response_format')
    template('{"x": "tools"}<|pad|>'); error(say(tools=[ADD]), 400, param='tool_choice')

# ---- browsers, proxies, other clients' habits

def test_head_and_a_slash_at_the_end(url):
    for path in ('/', '/healthz', '/readyz', '/metrics', '/v1/models'):
        h, g = httpx.head(url+path), httpx.get(url+path); assert h.status_code == g.status_code == 200 and h.content == b''
    assert httpx.get(f'{url}/v1/models/').json()['object'] == 'list'
    assert httpx.post(f'{url}/v1/completions/', json=dict(model='tiny', prompt='a', max_tokens=1)).status_code == 200

def test_pages_of_named_origins_may_ask(engine):
    me, ask = 'https://chat.example.org', {'Access-Control-Request-Method': 'POST',
                                           'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-os'}
    with running(engine, tokens=('a-good-token',), origins=(me,)) as (_, url):
        r = httpx.options(f'{url}/v1/chat/completions', headers=dict(Origin=me) | ask)
        assert r.status_code == 200
        assert r.headers['access-control-allow-origin'] == me and 'x-stainless-os' in r.headers['access-control-allow-headers']
        r = httpx.get(f'{url}/v1/models', headers=dict(Origin=me)); error(r, 401)
        assert r.headers['access-control-allow-origin'] == me           # a page can read why
        r = httpx.options(f'{url}/v1/models', headers=dict(Origin='https://evil.example') | ask)
        assert 'access-control-allow-origin' not in r.headers
    with running(engine) as (_, url):
        assert 'access-control-allow-origin' not in httpx.get(f'{url}/v1/models', headers=dict(Origin=me)).headers

def test_names_of_proxies(engine):
    with running(engine, hosts=doors.check_bind('127.0.0.1', (), names=('Chat.example.org',))) as (_, url):
        code = lambda host, path='/v1/models': httpx.get(url+path, headers=dict(Host=host)).status_code
        assert [code(h) for h in ('chat.example.org', 'localhost.', 'localhost:9', 'evil.example',
                                  '127.0.0.1.evil.example:80')] == [200, 200, 200, 421, 421] and code('evil.example', '/healthz') == 200

def test_both_kinds_of_addresses():
    if not socket.has_dualstack_ipv6(): pytest.skip('needs IPv6')
    with doors.listen('::', 0) as s:
        for host in ('127.0.0.1', '::1'): socket.create_connection((host, s.getsockname()[1])).close()

def test_a_body_without_its_kind_or_with_two_lengths(url):
    e = error(httpx.post(f'{url}/v1/completions', content=b'{}'), 415, code='unsupported_media_type')
    assert 'Content-Type: application/json' in e['message']
    with socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1]))) as s:
        s.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                  b'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n')
        got = s.makefile('rb').read(); assert got.startswith(b'HTTP/1.1 400') and b'connection: close' in got.lower()

def test_idle_connections_of_one_client_are_bounded(engine, monkeypatch):
    monkeypatch.setattr(api.Protocol, 'each', 4)
    with running(engine) as (_, url), contextlib.ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1])))) for _ in range(9)]
        wait_for(lambda: sum(dead(s, .02) for s in many) >= 5); assert httpx.get(f'{url}/healthz').status_code == 200

# ---- a process: no torch, little memory, a clean end

SERVE = '''import sys
from slm.serve.engine import GGUFEngine
from slm.serve.api import create_app, serve
from slm.serve.gate import Settings
e = GGUFEngine(sys.argv[1], slots=2, threads=1)
serve(create_app({'tiny': e}, Settings(max_tokens=2000, timeout=60)), port=0, say=lambda s: print(s, flush=True))
e.close(); print('torch' in sys.modules, flush=True)
'''

@contextlib.contextmanager
def process(tiny):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    with subprocess.Popen([sys.executable, '-c', SERVE, str(tiny)], stdout=subprocess.PIPE, text=True, env=env) as p:
        try:
            url = p.stdout.readline().split()[-1]; wait_for(lambda: httpx.get(f'{url}/readyz').status_code == 200); yield p, url
        finally: p.kill() if p.poll() is None else None

def test_sigterm_finishes_what_runs_and_exits_0_without_torch(tiny):
    with process(tiny) as (p, url):
        with httpx.Client(timeout=300) as keep, keep.stream('POST', f'{url}/v1/completions',
                                                            json=dict(model='tiny', prompt='a', max_tokens=2000, temperature=0, n=6,
                                                                      stream=True)) as s: # seconds of work
            lines = s.iter_lines(); next(lines); p.send_signal(signal.SIGTERM)
            r = wait_for(lambda: (r := httpx.get(f'{url}/readyz')).status_code == 503 and r); error(r, 503, code='draining')
            r = post(url, prompt='b'); error(r, 503, code='draining', type='server_error'); assert int(r.headers['retry-after']) > 0
            assert httpx.get(f'{url}/healthz').status_code == 200
            rest = [l for l in lines if l]
            assert rest[-1] == 'data: [DONE]' and json.loads(rest[-2][6:])['choices'][0]['finish_reason'] == 'length' and len(rest) > 100
        assert p.wait(120) == 0 and p.stdout.read().strip() == 'False'

def test_ctrl_c_ends_an_idle_server_at_once(tiny):
    with process(tiny) as (p, url): p.send_signal(signal.SIGINT); assert p.wait(58) == 0 # a request might take 60 s

def test_a_taken_port_is_one_line():
    with socket.create_server(('127.0.0.1', 0)) as s, pytest.raises(SLMError, match='cannot listen'):
        doors.listen('127.0.0.1', s.getsockname()[1])

# ---- any request

def test_no_request_makes_a_server_error(engine):
    "schemathesis reads our own schema and tries what fits it, and what does not"
    st = pytest.importorskip('schemathesis', reason='needs: pip install schemathesis')
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    with running(engine, max_tokens=8, queue=30, embed=dict(emb=lambda ts: ([[1.]]*len(ts), 1))) as (_, url):
        spec = httpx.get(f'{url}/openapi.json').json()
        assert set(spec['paths']) >= {'/v1/chat/completions', '/v1/completions', '/v1/models', '/v1/embeddings', '/v1/preferences'}
        for c in ('ChatBody', 'TextBody', 'EmbeddingBody'):
            spec['components']['schemas'][c]['properties']['model'] = dict(enum=['tiny', 'emb', 'none'])
        schema, seen = st.openapi.from_dict(spec), []
        for op in schema.get_all_operations():
            for mode in (st.GenerationMode.POSITIVE, st.GenerationMode.NEGATIVE):
                strategy = op.ok().as_strategy(generation_mode=mode)
                @settings(max_examples=25, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
                          suppress_health_check=list(HealthCheck))
                @given(case=strategy)
                def ask(case):
                    r = case.call(base_url=url, timeout=30); seen.append(r.status_code)
                    assert r.status_code < 500, (r.status_code, r.text)
                    if r.status_code >= 400: assert set(r.json()['error']) == {'message', 'type', 'param', 'code'}
                # nothing can be wrong with a request that has no fields
                with contextlib.suppress(Unsatisfiable): ask()
        assert {200, 400, 422} <= set(seen) and len(seen) > 150, sorted(set(seen))

# ---- the page

@pytest.fixture(scope='module')
def browser():
    import shutil
    pw = pytest.importorskip('playwright.sync_api', reason='needs: pip install playwright')
    chromium = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
    if not chromium: pytest.skip('needs Chromium (Debian: apt install chromium)')
    with pw.sync_playwright() as p: b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox']); yield b; b.close()

def test_page_is_one_file_under_a_strict_policy(url):
    r = httpx.get(f'{url}/'); p = r.headers['content-security-policy']
    assert r.headers['content-type'] == 'text/html; charset=utf-8'
    assert "default-src 'none'" in p and 'unsafe' not in p and p.count('sha256-') == 2
    assert not re.search(r'(src|href)="(?!data:)|https?://| style=| on\w+="|innerHTML', r.text)

@pytest.mark.slow
def test_page_in_chromium(engine, browser, tmp_path):
    from slm.train.annotate import PreferenceStore
    store = PreferenceStore(tmp_path/'p.db')
    with running(engine, tokens=('a-good-token',), preferences=tmp_path/'p.db', max_tokens=2000) as (app, url):
        page = browser.new_page(viewport=dict(width=1000, height=800)); faults = []
        page.on('console', lambda m: faults.append(m.text) if m.type == 'error' and '401' not in m.text else None)
        page.on('pageerror', lambda e: faults.append(str(e)))
        page.goto(url)
        page.wait_for_selector('dialog[open]'); page.fill('#token', 'wrong'); page.click('#enter'); page.wait_for_selector('dialog[open]')
        page.fill('#token', 'a-good-token'); page.keyboard.press('Enter'); page.wait_for_selector('#model option', state='attached')
        assert page.evaluate('sessionStorage.getItem("token")') == 'a-good-token' and page.evaluate('localStorage.length') == 0
        page.click('summary'); page.fill('#max_tokens', '30'); page.fill('#seed', '7'); page.fill('#system', 'Be brief.')
        page.fill('#text', '<b id=bold>Hi</b><img src=x onerror="window.hacked=1">')
        page.press('#text', 'Enter'); done = lambda: page.wait_for_selector('#send:not([hidden])')
        page.wait_for_selector('.note:has-text("tokens/s")'); done()
        assert page.locator('#bold').count() == 0 and page.evaluate('window.hacked') is None and '<b id=bold>' in page.inner_text('.user')
        first = page.locator('.answer .text').first.text_content(); assert first
        page.get_by_role('button', name='Good answer').click(); wait_for(lambda: page.locator('[aria-pressed=true]').count() == 1)
        page.get_by_role('button', name='Another answer, to compare').click()
        page.wait_for_selector('.answers.two'); page.wait_for_selector('text=Equally good'); done()
        boxes = [page.locator('.answer').nth(k).bounding_box() for k in (0, 1)]
        assert boxes[0]['y'] == boxes[1]['y'] and boxes[0]['x'] < boxes[1]['x']
        second = page.locator('.answer .text').nth(1).text_content(); assert second != first                # the next seed
        page.set_viewport_size(dict(width=380, height=700))
        boxes = [page.locator('.answer').nth(k).bounding_box() for k in (0, 1)]
        assert boxes[0]['x'] == boxes[1]['x'] and boxes[0]['y'] < boxes[1]['y']
        assert page.evaluate('document.documentElement.scrollWidth <= innerWidth')                         # nothing sticks out on a phone
        page.get_by_role('button', name='Answer 2 is better').click(); wait_for(lambda: store.pairs())
        p, = store.pairs()
        assert (p['chosen'], p['rejected']) == (second, first)
        assert [m['role'] for m in p['prompt']] == ['system', 'user'] and page.locator('.answer').count() == 1
        assert store.items()[0].responses[0].sampling == dict(temperature=.7, top_p=.95, max_tokens=30, seed=7)
        page.fill('#max_tokens', '1900')
        page.fill('#temperature', '0')
        page.fill('#text', 'And then?'); page.keyboard.press('Shift+Enter'); page.locator('#text').press('Enter')
        wait_for(lambda: page.locator('.answer .text').count() == 2 and len(page.locator('.answer .text').nth(1).text_content()) > 20)
        assert len(engine.running) == 1
        page.keyboard.press('Escape'); page.wait_for_selector('text=stopped'); wait_for(lambda: not engine.running); done()
        colour = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
        light = colour(); page.emulate_media(color_scheme='dark'); assert colour() != light
        page.fill('#max_tokens', '5000')
        page.fill('#text', 'More?')
        page.press('#text', 'Enter'); page.wait_for_selector('#alert:has-text("at most 2000")'); assert page.input_value('#text') == 'More?'
        page.get_by_role('button', name='New chat').click()
        assert page.locator('.turn').count() == 0 and page.evaluate("document.activeElement.id") == 'text'
        assert [f for f in faults if '400' not in f] == []; page.close()

@pytest.mark.slow
def test_the_picture_in_the_book(browser, tmp_path):
    "A comparison on the page, by the model in SLM_PAGE_MODEL (a .gguf file); SLM_PAGE_PICTURE=nbs/chat_page.png renews the picture"
    model = os.environ.get('SLM_PAGE_MODEL')
    if not model: pytest.skip('needs a .gguf file in SLM_PAGE_MODEL')
    e, picture = GGUFEngine(model), Path(os.environ.get('SLM_PAGE_PICTURE') or tmp_path/'page.png')
    with running(e, models={'SmolLM2-135M': e}, preferences=tmp_path/'p.db') as (_, url):
        page = browser.new_page(viewport=dict(width=900, height=560))
        page.goto(url); page.wait_for_selector('#model option', state='attached')
        page.click('summary'); page.fill('#seed', '3'); page.fill('#max_tokens', '60'); page.click('summary')
        page.fill('#text', 'What is the capital of France?')
        page.press('#text', 'Enter')
        page.wait_for_selector('text=tokens/s'); page.get_by_role('button', name='Another answer, to compare').click()
        page.wait_for_selector('text=Equally good', timeout=60_000); page.wait_for_timeout(300); page.screenshot(path=picture); page.close()
    e.close(); assert picture.read_bytes()[:4] == b'\x89PNG' and 10_000 < picture.stat().st_size < 200_000
