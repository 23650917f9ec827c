// An LSTM over time, by a matrix of kept blocks, by its windows, or in bytes, and the transducer's greedy loop: part of
// sparse.cpp.

// An LSTM over time whose W_hh is m, with its windows if there are (w.groups >= 0), or else `bytes`. x: its projections, or
// where `inputs` and `biases` (outputs) are given, W_ih, what they are made of.
std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& x, const Matrix* m, const Windows& w, const Bytes* bytes,
                                        const Tensor& h0, const Tensor& c0, const std::optional<Tensor>& lengths,
                                        bool reverse, const Bytes* inputs = nullptr, const float* biases = nullptr) {
  const int64_t batch = x.size(0), time = x.size(1), hidden = h0.size(1), outputs = 4 * hidden;
  std::vector<int64_t> ends(batch, time);
  if (lengths) {
    check_device(*lengths, "lengths", x, inputs ? "x" : "projections");
    TORCH_CHECK_TYPE(lengths->scalar_type() == at::kLong, "lengths must be int64, got ", lengths->scalar_type());
    TORCH_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == batch, "lengths must be (", batch, "), got ",
                      lengths->sizes());
    for (int64_t b = 0; b < batch; ++b) {
      ends[b] = (*lengths)[b].item<int64_t>();
      TORCH_CHECK_VALUE(ends[b] >= 0 && ends[b] <= time, "lengths must be between 0 and the ", time, " frames, got ",
                        ends[b]);
    }
  }
  // The longest come first, so that those that have not ended are the first of them at every step.
  std::vector<int64_t> order(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ends[a] > ends[b]; });
  Tensor out = fresh({batch, time, hidden}, x);
  for (int64_t b = 0; b < batch; ++b) {
    if (ends[b] < time) out.select(0, b).narrow(0, ends[b], time - ends[b]).zero_();
  }

  // States and gates, an utterance a row, with room for whole vectors; behind `hidden` the state stays 0, so that blocks
  // 1 x 4 and windows may read it. Many utterances are columns of one product, so that a step reads the matrix once:
  // `turned` is h as (hidden, utterances).
  const int64_t vectors = (hidden + 15) / 16, wide = round_up(hidden + BEHIND, LINE), width = round_up(batch, LINE);
  const Tensor states = at::zeros({2, batch, wide}, x.options());  // at cache lines, as no std::vector is
  float *const h = states.data_ptr<float>(), *const c = h + batch * wide;
  std::vector<float> gates(batch * outputs + 16);
  std::vector<float> turned(batch < FEW_COLUMNS || !m ? 0 : wide * width), zeros(round_up(outputs, BAND));
  std::vector<int64_t> places(wide);
  for (int64_t i = 0; i < wide; ++i) places[i] = i * width;
  const Tensor given = x.contiguous(), h_given = h0.contiguous(), c_given = c0.contiguous();
  for (int64_t i = 0; i < batch; ++i) {
    std::memcpy(&h[i * wide], h_given.const_data_ptr<float>() + order[i] * hidden, hidden * sizeof(float));
    std::memcpy(&c[i * wide], c_given.const_data_ptr<float>() + order[i] * hidden, hidden * sizeof(float));
  }
  if (!turned.empty()) kernels().transpose(h, wide, batch, hidden, turned.data(), width);
  const auto* in = given.const_data_ptr<float>();
  auto* out_data = out.data_ptr<float>();
  const int64_t threads = m ? threads_for(*m, batch) : threads_for(*bytes, batch);
  const auto begin = !m ? share(bytes->offsets, bytes->groups, threads)
                        : w.groups < 0 ? share(m->offsets, m->groups, threads) : share(w.offsets, w.groups, threads);
  const auto bands = m ? share_bands(*m, threads) : std::vector<int64_t>(threads + 1);
  // Projections are made here of some frames at a time: few stay near, many read W_ih seldom.
  std::optional<Standing> standing, input_standing;
  if (bytes) standing.emplace(*bytes);
  if (inputs) input_standing.emplace(*inputs);
  const int64_t of_state = bytes ? standing->bytes() : 0, of_input = inputs ? input_standing->bytes() : 0;
  const int64_t fit = 32 * PANEL / std::max<int64_t>(batch * (4 * outputs + of_input), 1);
  const int64_t some = inputs ? std::max<int64_t>(std::min({fit, FRAMES, time}), 1) : 0;
  std::vector<float> made(some * batch * outputs);
  const auto input_begin = inputs ? share(inputs->offsets, inputs->groups, threads) : std::vector<int64_t>();
  // Columns in bytes, all of them by each thread.
  const int64_t most = std::max<int64_t>(some, 1) * batch;
  const Tensor states_in_bytes = bytes ? standing->room(threads * batch, x) : Tensor();
  const Tensor inputs_in_bytes = inputs ? input_standing->room(threads * most, x) : Tensor();
  std::vector<float> all_scales(threads * most);
  std::vector<const float*> all_added(threads * most);
  std::vector<float*> all_sums(threads * most);
  Barrier barrier;
  const auto run = [&](int64_t thread, int64_t of) {  // this thread's share of every step
    const int64_t first = begin[thread * threads / of], last = begin[(thread + 1) * threads / of];
    const int64_t band = bands[thread * threads / of], band_end = bands[(thread + 1) * threads / of];
    const int64_t unit = vectors * thread / of * 16, units = std::min(vectors * (thread + 1) / of * 16, hidden) - unit;
    const auto frame = [&](int64_t i, int64_t step) {
      return order[i] * time + (reverse ? ends[order[i]] - 1 - step : step);
    };
    const auto projection = [&](int64_t i, int64_t step) {
      return inputs ? &made[(step % some * batch + i) * outputs] : in + frame(i, step) * outputs;
    };
    auto* const own_states = bytes ? states_in_bytes.data_ptr<int8_t>() + thread * batch * of_state : nullptr;
    auto* const own_inputs = inputs ? inputs_in_bytes.data_ptr<int8_t>() + thread * most * of_input : nullptr;
    float* const scales = all_scales.data() + thread * most;
    const float** const added = all_added.data() + thread * most;
    float** const sums = all_sums.data() + thread * most;
    int64_t n = batch;  // utterances that have not ended
    for (int64_t step = 0;; ++step) {
      while (n > 0 && ends[order[n - 1]] <= step) --n;
      if (n == 0) break;
      if (inputs && step % some == 0) {
        int64_t made_now = 0;
        for (int64_t later = step; later < step + some; ++later) {
          for (int64_t i = 0; i < n && later < ends[order[i]]; ++i, ++made_now) {
            const float* from = in + frame(i, later) * inputs->inputs;
            scales[made_now] = input_standing->put(*inputs, from, own_inputs + made_now * of_input);
            added[made_now] = biases;
            sums[made_now] = &made[(later % some * batch + i) * outputs];
          }
        }
        const int64_t from_group = input_begin[thread * threads / of], to_group = input_begin[(thread + 1) * threads / of];
        in_bytes(*inputs, *input_standing, {own_inputs, of_input, scales, added, sums}, made_now, from_group, to_group);
        barrier.wait(of);
      }
      if (bytes) {
        for (int64_t i = 0; i < n; ++i) {
          scales[i] = standing->put(*bytes, &h[i * wide], own_states + i * of_state);
          added[i] = projection(i, step);
          sums[i] = &gates[i * outputs];
        }
        in_bytes(*bytes, *standing, {own_states, of_state, scales, added, sums}, n, first, last);
      } else if (n < FEW_COLUMNS) {
        for (int64_t i = 0; i < n; ++i) {
          const float *from = projection(i, step), *own = &h[i * wide];
          float* to = &gates[i * outputs];
          if (w.groups >= 0) {
            kernels().in_windows(w, own, from, to, first, last);
          } else if (first < last) {  // an empty share may lie behind the outputs
            std::copy(from + first * m->r, from + std::min(last * m->r, outputs), to + first * m->r);
            kernels().one_column(*m, own, to, first, last);
          }
        }
      } else {
        kernels().many_columns(*m, turned.data(), places.data(), zeros.data(), gates.data(), n, band, band_end);
        for (int64_t i = 0; i < n; ++i) {
          const float* from = projection(i, step);
          float* to = &gates[i * outputs];
          for (int64_t row = band * BAND; row < std::min(band_end * BAND, outputs); ++row) to[row] += from[row];
        }
      }
      barrier.wait(of);
      if (units > 0) {
        for (int64_t i = 0; i < n; ++i) {
          float* own = &h[i * wide];
          kernels().lstm_cell(&gates[i * outputs], &c[i * wide], own, hidden, unit, unit + units);
          std::memcpy(out_data + frame(i, step) * hidden + unit, own + unit, units * sizeof(float));
          if (unit + units == hidden) std::fill(own + hidden, own + wide, 0.0f);
        }
        if (m && n >= FEW_COLUMNS) kernels().transpose(&h[unit], wide, n, units, &turned[unit * width], width);
      }
      barrier.wait(of);
    }
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  run(omp_get_thread_num(), omp_get_num_threads());
#else
  run(0, 1);
#endif
  const auto last_state = [&](const float* from) {
    Tensor state = at::empty({batch, hidden}, x.options());
    for (int64_t i = 0; i < batch; ++i) {
      std::memcpy(state.data_ptr<float>() + order[i] * hidden, &from[i * wide], hidden * sizeof(float));
    }
    return state;
  };
  return {out, last_state(h), last_state(c)};
}

// What sparse_lstm and sparse_lstm_in_bytes are both given.
int64_t check_lstm(const Tensor& projections, const Tensor& h0, const Tensor& c0) {
  TORCH_CHECK_TYPE(projections.scalar_type() == at::kFloat, "projections must be float32, got ",
                   projections.scalar_type());
  TORCH_CHECK_VALUE(projections.dim() == 3 && projections.size(2) % 4 == 0,
                    "projections must be (batch, time, 4 * hidden), got ", projections.sizes());
  const int64_t batch = projections.size(0), hidden = projections.size(2) / 4;
  check_floats(h0, "h0", {batch, hidden}, projections, "projections");
  check_floats(c0, "c0", {batch, hidden}, projections, "projections");
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> sparse_lstm(const Tensor& projections, const Tensor& values, const Tensor& columns,
                                               const Tensor& offsets, const std::optional<Tensor>& scales,
                                               const Tensor& h0, const Tensor& c0, const std::optional<Tensor>& lengths,
                                               bool reverse, at::TensorList windows) {
  const int64_t hidden = check_lstm(projections, h0, c0);
  const Matrix m = check_matrix(values, columns, offsets, scales, 4 * hidden, hidden, projections, "projections");
  return lstm(projections, &m, check_windows(windows, m, projections, "projections"), nullptr, h0, c0, lengths, reverse);
}

std::tuple<Tensor, Tensor, Tensor> sparse_lstm_in_bytes(const Tensor& projections, at::TensorList bytes, const Tensor& h0,
                                                        const Tensor& c0, const std::optional<Tensor>& lengths,
                                                        bool reverse) {
  const int64_t hidden = check_lstm(projections, h0, c0);
  const Bytes m = check_bytes(bytes, 4 * hidden, hidden, projections, "projections");
  return lstm(projections, nullptr, {}, &m, h0, c0, lengths, reverse);
}

std::tuple<Tensor, Tensor, Tensor> sparse_lstm_layer_in_bytes(const Tensor& x, at::TensorList inputs,
                                                              const std::optional<Tensor>& bias, at::TensorList recurrent,
                                                              const Tensor& h0, const Tensor& c0,
                                                              const std::optional<Tensor>& lengths, bool reverse) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be (batch, time, inputs), got ", x.sizes());
  TORCH_CHECK_VALUE(h0.dim() == 2, "h0 must be (batch, hidden), got ", h0.sizes());
  const int64_t batch = x.size(0), hidden = h0.size(1);
  TORCH_CHECK_VALUE(hidden <= 1 << 16, "hidden must be at most 65536, got ", hidden);
  check_floats(h0, "h0", {batch, hidden}, x, "x");
  check_floats(c0, "c0", {batch, hidden}, x, "x");
  if (bias) check_floats(*bias, "bias", {4 * hidden}, x, "x");
  const Bytes of_inputs = check_bytes(inputs, 4 * hidden, x.size(2), x, "x", "inputs");
  const Bytes m = check_bytes(recurrent, 4 * hidden, hidden, x, "x", "recurrent");
  if (threads_for(of_inputs, batch * x.size(1)) > threads_for(m, batch)) {  // more threads make them faster than one cache
    return sparse_lstm_in_bytes(sparse_linear_in_bytes(x, inputs, bias, 4 * hidden), recurrent, h0, c0, lengths, reverse);
  }
  const std::vector<float> biases = padded_bias(bias, 4 * hidden);
  return lstm(x, nullptr, {}, &m, h0, c0, lengths, reverse, &of_inputs, biases.data());
}

// Greedy decoding of one utterance: at each frame tokens are emitted until the blank, token 0, wins.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> sparse_transducer(
    const Tensor& encoder_out, const Tensor& inputs, at::TensorList recurrent, at::TensorList projection,
    at::TensorList output, const std::optional<Tensor>& bias, int64_t max_symbols, at::TensorList state,
    at::TensorList windows) {
  for (const auto& [x, name] : {std::pair(&encoder_out, "encoder_out"), std::pair(&inputs, "inputs")}) {
    TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, name, " must be float32, got ", x->scalar_type());
    TORCH_CHECK_VALUE(x->dim() == 2, name, " must have two dimensions, got ", x->sizes());
  }
  const int64_t frames = encoder_out.size(0), joiner = encoder_out.size(1), tokens = inputs.size(0);
  TORCH_CHECK_VALUE(tokens > 0 && inputs.size(1) % 4 == 0, "inputs must be (tokens, 4 * hidden), got ", inputs.sizes());
  check_device(inputs, "inputs", encoder_out, "encoder_out");
  const int64_t hidden = inputs.size(1) / 4;
  if (bias) check_floats(*bias, "bias", {tokens}, encoder_out, "encoder_out");
  const auto matrix = [&](const char* name, at::TensorList t, int64_t outputs, int64_t inputs) {
    TORCH_CHECK_VALUE(t.size() == 3 || t.size() == 4, name, " must be values, columns, offsets and scales if any, got ",
                      t.size(), " tensors");
    const auto scales = t.size() == 4 ? std::optional<Tensor>(t[3]) : std::nullopt;
    for (const auto& tensor : t) check_device(tensor, name, encoder_out, "encoder_out");
    return check_matrix(t[0], t[1], t[2], scales, outputs, inputs, encoder_out, "encoder_out");
  };
  const Matrix w_hh = matrix("recurrent", recurrent, 4 * hidden, hidden);
  const bool bytes = windows.size() == 7;  // W_hh in that form
  const Windows in_windows = check_windows(bytes ? at::TensorList() : windows, w_hh, encoder_out, "encoder_out");
  const Bytes of_bytes = bytes ? check_bytes(windows, 4 * hidden, hidden, encoder_out, "encoder_out") : Bytes();
  const Matrix projects = matrix("projection", projection, joiner, hidden), out = matrix("output", output, tokens, joiner);
  TORCH_CHECK_VALUE(state.empty() || state.size() == 3, "state must be predictor_out, h and c, or nothing, got ",
                    state.size(), " tensors");

  const Tensor encoded = encoder_out.contiguous(), given = inputs.contiguous();
  const Tensor states = at::zeros({2, round_up(hidden + BEHIND, LINE)}, encoder_out.options());
  float *const h = states.data_ptr<float>(), *const c = h + states.size(1);
  std::vector<float> gates(4 * hidden + 16);
  std::vector<float> predicted(joiner), joined(round_up(joiner, 4)), logits(tokens);
  const std::vector<float> biases = padded_bias(bias, tokens);
  std::vector<int64_t> emitted, at_frame;
  std::vector<float> probability;
  const int64_t threads = bytes ? threads_for(of_bytes, 1) : threads_for(w_hh, 1);
  const auto begin = bytes ? share(of_bytes.offsets, of_bytes.groups, threads)
                     : in_windows.groups < 0 ? std::vector<int64_t>() : share(in_windows.offsets, in_windows.groups, threads);
  std::optional<Standing> standing;
  if (bytes) standing.emplace(of_bytes);
  const Tensor column = bytes ? standing->room(1, encoder_out) : Tensor();
  const auto below = [](float a, float b) { return a < b || (a == a && b != b); };  // a NaN is most, as in argmax
  const auto predict = [&](int64_t token) {
    const float* input = given.const_data_ptr<float>() + token * 4 * hidden;
    if (bytes) {
      auto* const at_column = column.data_ptr<int8_t>();
      const float scale = standing->put(of_bytes, h, at_column);
      float* to = gates.data();
      at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        in_bytes(of_bytes, *standing, {at_column, 0, &scale, &input, &to}, 1, begin[first], begin[last]);
      });
    } else if (in_windows.groups < 0) {
      std::memcpy(gates.data(), input, 4 * hidden * sizeof(float));
      few_columns(w_hh, h, 0, gates.data(), 1);
    } else {
      at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
        kernels().in_windows(in_windows, h, input, gates.data(), begin[first], begin[last]);
      });
    }
    kernels().lstm_cell(gates.data(), c, h, hidden, 0, hidden);
    std::fill(h + hidden, c, 0.0f);  // blocks 1 x 4 and windows may read it
    std::fill(predicted.begin(), predicted.end(), 0.0f);
    few_columns(projects, h, 0, predicted.data(), 1);
  };
  const std::tuple<const char*, float*, int64_t> parts[] = {
      {"predictor_out", predicted.data(), joiner}, {"h", h, hidden}, {"c", c, hidden}};
  if (state.empty()) {
    predict(0);
  } else {
    for (int i = 0; i < 3; ++i) {
      const auto& [name, to, size] = parts[i];
      check_floats(state[i], name, {size}, encoder_out, "encoder_out");
      std::memcpy(to, state[i].contiguous().const_data_ptr<float>(), size * sizeof(float));
    }
  }
  for (int64_t t = 0; t < frames; ++t) {
    const float* frame = encoded.const_data_ptr<float>() + t * joiner;
    for (int64_t symbols = 0; symbols < max_symbols; ++symbols) {
      for (int64_t j = 0; j < joiner; ++j) joined[j] = std::tanh(frame[j] + predicted[j]);
      logits = biases;
      few_columns(out, joined.data(), 0, logits.data(), 1);
      const int64_t best = std::max_element(logits.begin(), logits.end(), below) - logits.begin();
      if (best == 0) break;
      emitted.push_back(best);
      at_frame.push_back(t);
      double sum = 0;
      for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - logits[best]);
      probability.push_back(static_cast<float>(1 / sum));
      predict(best);
    }
  }
  const auto longs = encoder_out.options().dtype(at::kLong);
  std::vector<Tensor> after;
  for (const auto& [name, from, size] : parts) {
    after.push_back(at::empty({size}, encoder_out.options()));
    std::memcpy(after.back().data_ptr<float>(), from, size * sizeof(float));
  }
  return {at::tensor(emitted, longs), at::tensor(at_frame, longs), at::tensor(probability, encoder_out.options()), after};
}
