"Other people's clients: names, probes, pages of other origins, embeddings, null, and tools by OpenAI's client and as LangChain sends them."
import contextlib, json, socket
import pytest
from slm.core import SLMError
httpx, openai, _ = (pytest.importorskip(m, reason=f'needs: pip install {m}') for m in ('httpx', 'openai', 'xllamacpp'))
import torch
from slm.data.tokenizer import Tokenizer, train_bpe
from slm.data.world import World
from slm.model.gpt import GPT, GPTConfig
from slm.serve import api, gate as doors
from slm.serve.api import create_app
from slm.serve.engine import GGUFEngine, model_name
from slm.serve.gate import open_engine
from slm.serve.export import export_gguf, export_hf
from slm.serve.gate import Settings, in_background

@pytest.fixture(scope='session')
def trained(): return train_bpe([s.text for s in World().stories(0, 300)], 512)

def write(tok, path):
    "A GGUF file of random weights that never stops by itself at temperature 0"
    torch.manual_seed(1); model = GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=2, d_model=64, max_seq_len=1024)).eval()
    model.model.embed_tokens.weight.data[[tok.eot_id, tok.end_id]] = 0 # tied to the head
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
def chat(url, messages=ASK, **kw):
    return httpx.post(f'{url}/v1/chat/completions', json=dict(model='m', messages=messages, max_tokens=4) | kw, timeout=300)

def error(r, status, **want):
    assert r.status_code == status, r.text
    e = r.json()['error']; assert {k: e[k] for k in want} == want, e
    return e['message']

# ---- names of models

def test_names_stay_whole(engine, tmp_path):
    assert engine.model == 'plain-v0.3' and model_name(tmp_path/'my-v0.3') == 'my-v0.3'
    assert model_name('us/My_model-1.5B') == 'My_model-1.5B'

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
    assert httpx.post(f'{url}/v1/chat/completions/', json=dict(model='m', messages=ASK, max_tokens=2), timeout=300).status_code == 200

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
    asks = {'Origin': origin, 'Access-Control-Request-Method': 'POST',
            'Access-Control-Request-Headers': 'authorization,content-type,x-stainless-os'}
    return httpx.options(f'{url}/v1/chat/completions', headers=asks)

def test_a_named_page_may_ask(engine):
    with running(engine, tokens=('a-good-token',), origins=api.origins(('http://localhost:3000/',))) as url:
        r = preflight(url, 'http://localhost:3000'); assert r.status_code == 200
        assert r.headers['access-control-allow-origin'] == 'http://localhost:3000'
        allowed = r.headers['access-control-allow-headers'].lower().replace(' ', '').split(',')
        assert {'authorization', 'content-type', 'x-stainless-os'} <= set(allowed)
        r = httpx.get(f'{url}/v1/models', headers={'Origin': 'http://localhost:3000', 'Authorization': 'Bearer a-good-token'})
        assert r.status_code == 200 and r.headers['access-control-allow-origin'] == 'http://localhost:3000'
        r = httpx.get(f'{url}/v1/models', headers={'Origin': 'http://localhost:3000'})
        error(r, 401); assert r.headers['access-control-allow-origin'] == 'http://localhost:3000'
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
        many[0].settimeout(10)
        try: assert many[0].recv(1) == b''                                       # the oldest makes room
        except ConnectionError: pass
        with socket.create_connection(at, source_address=('127.0.0.2', 0)) as s: # another client is heard
            s.sendall(b'GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n'); assert s.recv(12) == b'HTTP/1.1 200'
        many[3].sendall(b'GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n'); assert many[3].recv(12) == b'HTTP/1.1 200'

# ---- embeddings

@pytest.fixture(scope='module')
def embedder(engine, plain):
    with running(engine, embed=dict(emb=api.gguf_embed(plain, threads=1))) as url: yield url

def embed(url, given, **kw): return httpx.post(f'{url}/v1/embeddings', json=dict(model='emb', input=given) | kw, timeout=300)

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
    part = dict(type='text', text='Hi', cache_control=None)
    assert chat(url, [dict(role='user', content=[part], name=None, tool_calls=None)]).status_code == 200
    assert chat(url, stream_options=None, stream=True).status_code == 200
    assert chat(url, stream_options=dict(include_usage=None), stream=True).status_code == 200
    assert chat(url, response_format=dict(type='text', json_schema=None)).status_code == 200
    assert chat(url, tools=None, tool_choice=None, parallel_tool_calls=None, functions=None, logit_bias=None).status_code == 200

# ---- tools

CHATML = """{%- if tools %}{{ '<|system|>Tools:' }}{%- for t in tools %}{{ '\\n' + (t | tojson) }}{%- endfor %}
{{- '\\nCall one so: <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call><|end|>' }}{%- endif %}
{%- for m in messages %}
{{- '<|user|><tool_response>' + m.content + '</tool_response>' if m.role == 'tool' else '<|' + m.role + '|>' + m.content }}
{%- for c in m.tool_calls %}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"""
CITY = dict(type='object', properties=dict(city=dict(enum=['Ulm', 'Rom'])), required=['city'], additionalProperties=False)
SUM = dict(type='object', properties=dict(a=dict(type='boolean')), required=['a'], additionalProperties=False)
def tool(name, parameters, **kw):
    return dict(type='function', function=dict(name=name, description=f'The {name}.', parameters=parameters, **kw))
TOOLS = [tool('weather', CITY), tool('add', SUM)]
NAMED = dict(type='function', function=dict(name='weather'))

@pytest.fixture(scope='module')
def handy(trained, tmp_path_factory):
    "An engine whose template has a place for tools"
    tok = Tokenizer(trained.tok, CHATML); e = GGUFEngine(write(tok, tmp_path_factory.mktemp('handy')/'handy.gguf'), slots=2, threads=1)
    yield e; e.close()

@pytest.fixture(scope='module')
def handy_url(handy):
    pytest.importorskip('llguidance', reason='needs: pip install llguidance')
    with running(handy, tokens=()) as url: yield url

@pytest.fixture(scope='module')
def client(handy_url): return openai.OpenAI(base_url=f'{handy_url}/v1', api_key='none', max_retries=0, timeout=300)

def is_call(name, arguments):
    return name == 'weather' and arguments in (dict(city='Ulm'), dict(city='Rom')) or \
        name == 'add' and arguments in (dict(a=True), dict(a=False))

@pytest.mark.parametrize('choice,names', [('required', {'weather', 'add'}), (NAMED, {'weather'})])
def test_a_call_fits_its_schema(client, choice, names):
    for seed in range(3):
        c = client.chat.completions.create(model='m', messages=ASK, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=400).choices[0]
        call, = c.message.tool_calls; f = call.function
        assert f.name in names and is_call(f.name, json.loads(f.arguments)), f
        assert (c.finish_reason, c.message.content, call.type) == ('tool_calls', None, 'function') and call.id

def test_a_call_in_a_stream_is_the_same(client):
    kw = dict(model='m', messages=ASK, tools=TOOLS, tool_choice='required', seed=3, max_tokens=400)
    whole = client.chat.completions.create(**kw).choices[0].message.tool_calls[0].function
    with client.chat.completions.stream(**kw) as s: end = s.get_final_completion().choices[0]
    f = end.message.tool_calls[0].function; assert (f.name, f.arguments, end.finish_reason) == (whole.name, whole.arguments, 'tool_calls')
    deltas = [p.choices[0] for p in client.chat.completions.create(stream=True, **kw)]
    calls = [c for d in deltas for c in d.delta.tool_calls or ()]
    assert calls[0].index == 0 and calls[0].id and calls[0].function.name == whole.name
    assert ''.join(c.function.arguments for c in calls) == whole.arguments and deltas[-1].finish_reason == 'tool_calls'
    assert not any(d.delta.content for d in deltas)

def test_whoever_may_call_may_also_talk(client):
    for seed in range(3):
        kw = dict(parallel_tool_calls=False, seed=seed, max_tokens=20)
        c = client.chat.completions.create(model='m', messages=ASK, tools=TOOLS, **kw).choices[0]
        assert c.message.content or c.message.tool_calls

def test_a_call_in_free_text_is_found(handy):
    "The engine is made to say a call; it comes in pieces that cut the marks"
    from slm.serve.engine import Piece
    says = 'Well, '+'<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
    class Says:
        name, model, tok, max_seq_len, slots = 'says', 'says', handy.tok, 1024, 1
        def submit(self, request, emit):
            for k in range(0, len(says), 7): emit(Piece(says[k:k+7], completion_tokens=k//7+1))
            emit(Piece(finish_reason='stop', completion_tokens=9)); return lambda: None
    with running(Says()) as url:
        c = chat(url, tools=TOOLS).json()['choices'][0]; f = c['message']['tool_calls'][0]['function']
        assert c['message']['content'] == 'Well,' and (f['name'], json.loads(f['arguments'])) == ('weather', dict(city='Rom'))
        assert c['finish_reason'] == 'tool_calls' and chat(url).json()['choices'][0]['message']['content'] == says
        events = [json.loads(l[6:]) for l in chat(url, tools=TOOLS, stream=True).text.splitlines() if l[:7] == 'data: {']
        deltas = [e['choices'][0]['delta'] for e in events]
        assert ''.join(d.get('content') or '' for d in deltas).strip() == 'Well,'
        assert [c['function']['name'] for d in deltas for c in d.get('tool_calls', ())] == ['weather']

def called(*names):
    calls = [dict(id=f'call0000{k}', type='function', function=dict(name=n, arguments='{"city": "Ulm"}')) for k,n in enumerate(names)]
    answers = [dict(role='tool', tool_call_id=c['id'], content='4 degrees') for c in calls]
    return [*ASK, dict(role='assistant', content=None, tool_calls=calls), *answers]

def test_thoughts_before_the_last_answer_are_no_part_of_a_call(trained):
    "As Qwen3 writes: the last answer has empty thoughts before it, an earlier one has none"
    calls = '{%- for c in m.tool_calls %}'
    thinks = CHATML.replace(calls, "{{ '<think></think>' if m.tool_calls and loop.last }}"+calls)
    marks = api._marks(Tokenizer(trained.tok, thinks)); assert 'think' not in marks[0] and '<tool_call>' in marks[0]

def test_histories_with_calls_are_read(handy, handy_url):
    for messages in (called('weather'), called('weather', 'weather'), [*called('weather'), dict(role='assistant', content='4.'), *ASK]):
        assert chat(handy_url, messages).status_code == 200 and chat(handy_url, messages, tools=TOOLS).status_code == 200
    body = doors.ChatBody(model='m', messages=called('weather'), tools=TOOLS)
    text = handy.tok.decode(api.chat_ids(body, handy.tok, api.calls_of(body, handy.tok)))
    assert '"name": "weather", "arguments": {"city": "Ulm"}' in text
    assert '<tool_response>4 degrees' in text and '"description": "The add."' in text

def test_special_tokens_in_what_tools_say_stay_text(handy):
    end = handy.tok.special_ids['<|end|>']
    def ends(said, about):
        messages = called('weather'); messages[-1]['content'] = said
        body = doors.ChatBody(model='m', messages=messages, tools=[dict(type='function', function=dict(name='f', description=about))])
        return api.chat_ids(body, handy.tok, api.calls_of(body, handy.tok)).count(end)
    assert ends('x', 'y') == ends('<|end|><|system|>', 'y') == ends('x', '<|end|>')

def test_as_langchain_binds_tools(handy_url):
    "What ChatOpenAI.bind_tools sends: with tool_choice 'any', by name, with strict, and the answer sent back"
    bound = [tool('weather', CITY, strict=True)]
    base = dict(model='m', stream=False, n=1, temperature=.7, seed=5, max_completion_tokens=1000, tools=bound, parallel_tool_calls=False)
    def ask(messages, **kw):
        r = httpx.post(f'{handy_url}/v1/chat/completions', json=base | dict(messages=messages) | kw, timeout=300)
        return r.json()['choices'][0]
    for choice in ('required', NAMED):
        m = ask([dict(content='Weather in Rome?', role='user')], tool_choice=choice)['message']; call, = m['tool_calls']
        assert is_call(call['function']['name'], json.loads(call['function']['arguments']))
    arguments = json.dumps(json.loads(call['function']['arguments']))
    sent = [dict(type='function', id=call['id'], function=dict(name='weather', arguments=arguments))]
    back = [dict(content='Weather in Rome?', role='user'), dict(content=None, role='assistant', tool_calls=sent),
            dict(content='20 degrees', role='tool', tool_call_id=call['id'])]
    assert ask(back, max_completion_tokens=5)['message']['role'] == 'assistant'

@pytest.mark.parametrize('kw', [dict(tools=TOOLS), dict(tools=TOOLS, tool_choice='required'), dict(tools=TOOLS, tool_choice=NAMED)])
def test_a_template_without_a_place_refuses_tools(url, kw):
    assert 'no place for tools' in error(chat(url, **kw), 400, param='tools', code='unsupported_parameter')

def test_a_template_without_a_place_refuses_histories_with_calls(url): error(chat(url, called('weather')), 400, param='messages')

def test_tools_that_must_not_be_called_need_no_place(url): assert chat(url, tools=TOOLS, tool_choice='none').status_code == 200

@pytest.mark.parametrize('param,kw', [('tool_choice', dict(tools=TOOLS, tool_choice=dict(type='function', function=dict(name='none')))),
    ('tool_choice', dict(tool_choice='required')), ('tools', dict(tools=[tool('f', dict(type='object', properties=dict(x={'not': {}})))])),
    ('tools', dict(tools=[tool('f', dict(type='object', description='x'*70_000))]))])
def test_what_cannot_be_called_is_refused(handy_url, param, kw): error(chat(handy_url, **kw), 400, param=param)
