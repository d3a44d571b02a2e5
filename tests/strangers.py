"Tiny Llama folders in the shapes of other people's checkpoints."
import json
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 'otter heron badger lynx stork newt vole ibis crane mole'.split()
TEXT = [f'Question {i}: what does the {WORDS[i%10]} carry? The {WORDS[i*7%10]} carries a kettle. Hello world!' for i in range(200)]
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
BEGIN, END = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}{{ '<｜User｜>' + m['content'] "
            "}}{% elif m['role']=='assistant' %}{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' "
            "}}{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content']|trim "
          "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
QWEN3 = ("{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role']=='user' %}{% set ns.last "
         "= loop.index0 %}{% endif %}{% endfor %}"
         "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role']=='assistant' and loop.index0 > ns.last %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
IM = ['<|begin_of_text|>', '<|end_of_text|>', '<|im_start|>', '<|im_end|>']
HEADERS = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']

def bpe(specials=(), plain=()):
    t = Tokenizer(models.BPE()); t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_tokens([AddedToken(p, special=False, normalized=False) for p in plain]); return t

def begun(t, bos):
    t.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.token_to_id(bos))]); return t

# shape -> special tokens, added ones that are not special, does the tokenizer put bos
# before, tokenizer_config, ids in config.json, in generation_config.json
SHAPES = dict(
    gpt2=(['<|endoftext|>'], [], False, dict(bos_token='<|endoftext|>', eos_token='<|endoftext|>'), (0, 0), None),
    smollm=(['<|endoftext|>', '<|im_start|>', '<|im_end|>'], [], False, dict(bos_token='<|endoftext|>', eos_token='<|endoftext|>'), (0, 0),
            None),
    deepseek=([BEGIN, END, '<｜User｜>', '<｜Assistant｜>', '<｜▁pad▁｜>'], [], True,
              dict(bos_token=BEGIN, eos_token=END, pad_token='<｜▁pad▁｜>', chat_template=DEEPSEEK), (0, 1), None),
    hermes=(IM, [], True, dict(bos_token=IM[0], eos_token=IM[3], chat_template=[dict(name='default', template=CHATML),
            dict(name='tool_use', template='{{ tools }}'+CHATML)]), (0, 3), None),
    llama3=(HEADERS, [], True,
            dict(bos_token=HEADERS[0], eos_token=dict(__type='AddedToken', content=HEADERS[4], special=True), chat_template=LLAMA3),
            (0, 1), [1, 4]),
    pad_added=(IM, [], True, dict(bos_token=IM[0], eos_token=IM[3], pad_token='<pad>', chat_template=CHATML), (0, 3), None),
    none_special=(['<|endoftext|>'], ['<|im_start|>', '<|im_end|>'], False, dict(eos_token='<|im_end|>', chat_template=CHATML), (0, None),
                  None),
    qwen3=(['<|endoftext|>', '<|im_start|>', '<|im_end|>'], ['<think>', '</think>'], False,
           dict(eos_token='<|im_end|>', pad_token='<|endoftext|>', chat_template=QWEN3), (0, 2), [2, 0]))

def stranger(folder, shape, **over):
    "Write one of `SHAPES`"
    specials, plain, front, conf, (bos, eos), ends = SHAPES[shape]
    t = bpe(specials, plain); n = t.get_vocab_size()
    if front: begun(t, specials[0])
    if shape == 'pad_added': t.add_special_tokens(['<pad>'])
    if eos is None: eos = t.token_to_id(conf['eos_token'])
    torch.manual_seed(0)
    c = LlamaConfig(**(dict(vocab_size=n, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2,
                            max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=bos, eos_token_id=eos) | over))
    LlamaForCausalLM(c).save_pretrained(folder); t.save(str(folder/'tokenizer.json'))
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(conf, tokenizer_class='PreTrainedTokenizerFast')))
    g = folder/'generation_config.json'; d = json.loads(g.read_text()) if g.exists() else {}
    if ends: g.write_text(json.dumps(d | dict(eos_token_id=ends)))
    return folder
