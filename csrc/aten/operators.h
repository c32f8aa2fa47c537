// The operators on tensors, one function per schema of ops.cpp and the same for every device. `overwrite` is read by
// the gradients alone, which stand in engine_fast/ops.
#pragma once

#include <ATen/core/List.h>

#include "aten/options.h"

namespace engine_fast {

std::tuple<Tensor, Tensor> energy(const Tensor& z, const Tensor& s, const Maybe& noise, const Maybe& seed,
                                  const Maybe& weight, const Maybe& ignore, bool hard, bool identity,
                                  double temperature, bool overwrite);

std::tuple<Tensor, Tensor> energy_backward(const Tensor& grad, const Tensor& z, const Tensor& s, const Tensor& stats,
                                           const Maybe& noise, const Maybe& seed, const Maybe& weight,
                                           const Maybe& ignore, bool hard, bool identity, double temperature,
                                           bool need_z, bool need_s);

// dz and ds may be z and s, or each other's.
void energy_backward_(const Tensor& grad, const Tensor& z, const Tensor& s, const Tensor& stats, const Maybe& noise,
                      const Maybe& seed, const Maybe& weight, const Maybe& ignore, bool hard, bool identity,
                      double temperature, const Maybe& dz, const Maybe& ds);

std::tuple<Tensor, Tensor> soft_embedding(const Tensor& z, const Tensor& table, const Maybe& noise, const Maybe& seed,
                                          const Maybe& ignore, bool hard, bool identity, double temperature);

std::tuple<Tensor, Tensor> soft_embedding_backward(const Tensor& grad, const Tensor& z, const Tensor& table,
                                                   const Tensor& stats, const Maybe& noise,
                                                   const Maybe& seed, const Maybe& ignore, bool hard, bool identity,
                                                   double temperature, bool need_z, bool need_table);

Tensor linear_energy(const Tensor& h_student, const Tensor& w_student, const Maybe& b_student, const Tensor& h_teacher,
                     const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed,
                     const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature);

// The energies, and the gradients of <grad, energies>. needs: h, w, b of the student, then of the teacher.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_energy_gradients(
    const Tensor& grad, const Tensor& h_student, const Tensor& w_student, const Maybe& b_student,
    const Tensor& h_teacher, const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed,
    const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature, c10::List<bool> needs);

// The sum of the energies and its gradients, made at once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_energy_sum(
    const Tensor& h_student, const Tensor& w_student, const Maybe& b_student, const Tensor& h_teacher,
    const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed, const Maybe& weight,
    const Maybe& ignore, bool hard, bool identity, double temperature, c10::List<bool> needs, bool overwrite);

// energy, s (or no rows of it), statistics, and each row's gradient of its energy to h_teacher.
std::tuple<Tensor, Tensor, Tensor, Tensor> teacher_energy(const Tensor& z, const Tensor& h_teacher,
                                                          const Tensor& w_teacher, const Maybe& b_teacher,
                                                          const Maybe& noise, const Maybe& seed, const Maybe& weight,
                                                          const Maybe& ignore, bool hard, bool identity,
                                                          double temperature, bool need_logits, bool need_hidden,
                                                          bool overwrite);

// x, and z (or no rows of it).
std::tuple<Tensor, Tensor> linear_soft_embedding(const Tensor& h, const Tensor& w, const Maybe& b, const Tensor& table,
                                                 const Maybe& noise, const Maybe& seed, const Maybe& ignore, bool hard,
                                                 bool identity, double temperature, bool keep_logits);

// log-probability and id of each row's best word that is not forbidden.
std::tuple<Tensor, Tensor> linear_argmax(const Tensor& h, const Tensor& w, const Maybe& b, at::IntArrayRef forbidden);

// needs: h, w, b, table. grad of x, grad_z of the logits; at least one of them.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_soft_embedding_backward(
    const Maybe& grad, const Maybe& grad_z, const Tensor& h, const Tensor& w, const Maybe& b, const Tensor& table,
    const Maybe& kept_z, const Maybe& noise, const Maybe& seed, const Maybe& ignore, bool hard, bool identity,
    double temperature, c10::List<bool> needs);

}  // namespace engine_fast
