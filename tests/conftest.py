"Slow tests run only with --slow; what tests build never touches the user's own cache."
import os, pytest
from collections import Counter
from hypothesis import settings

settings.register_profile('repeatable', derandomize=True) # the same examples in each run; --slow looks for new ones

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow too')

def pytest_configure(config):
    if not config.getoption('--slow'): settings.load_profile('repeatable')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    skip = pytest.mark.skip(reason='slow: run with --slow')
    for item in items:
        if 'slow' in item.keywords: item.add_marker(skip)

def pytest_terminal_summary(terminalreporter):
    "What was skipped, by reason"
    skipped = Counter(r.longrepr[2].removeprefix('Skipped: ') for r in terminalreporter.stats.get('skipped', []))
    for why,n in skipped.most_common(): terminalreporter.write_line(f'skipped {n}: {why}')

@pytest.fixture(scope='session', autouse=True)
def _own_home(tmp_path_factory):
    "Corpora and tokens go to a folder of this test session"
    old = os.environ.get('SLM_HOME'); os.environ['SLM_HOME'] = str(tmp_path_factory.mktemp('slm_home'))
    os.environ.setdefault('TQDM_DISABLE', '1')
    yield
    if old is None: del os.environ['SLM_HOME']
    else: os.environ['SLM_HOME'] = old

@pytest.fixture(scope='session')
def random_model(tmp_path_factory):
    "Makes a folder with random weights: enough wherever only the numbers' agreement counts"
    def make(max_seq_len):
        from slm.data.tokenizer import train_bpe
        from slm.data.world import World
        from slm.model.gpt import GPT, GPTConfig
        path = tmp_path_factory.mktemp('model')/'m'; tok = train_bpe((s.text for s in World().stories(1, 300)), 700)
        GPT(GPTConfig(vocab_size=tok.vocab_size, n_layer=2, d_model=64, n_head=2, n_kv_head=1,
                      max_seq_len=max_seq_len)).save_pretrained(path, tok); return path
    return make
